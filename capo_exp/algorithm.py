"""What an algorithm is: five functions and two numbers. conf/algo/*.yaml names them; this file says how they
are called."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from capo_exp import parts
from capo_exp.config import AlgoConfig
from capo_exp.types import Batch, BatchShifts, BatchTotals, Selection, TokenLoss, TokenShifts


class Advantage(Protocol):
    def __call__(self, rewards: Tensor) -> Tensor:
        """rewards [P, G] -> advantages [P, G]."""
        ...


class Select(Protocol):
    def __call__(self, shifts: TokenShifts, batch: Batch, log_probs: Tensor) -> Selection:
        """Which completion tokens take part; log_probs [B, T] carry no gradient."""
        ...


class TokenLossFunction(Protocol):
    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> TokenLoss:
        """[B, T], [B, T], [B] -> loss of each token [B, T], differentiable in log_probs."""
        ...


class Aggregation(Protocol):
    def __call__(
        self, values: Tensor, keep_mask: Tensor, completion_mask: Tensor, totals: BatchTotals
    ) -> Tensor:
        """Token losses [B, T] -> this micro-batch's part of the step's scalar loss."""
        ...


class StepRule(Protocol):
    def __call__(self, predicted: BatchShifts, learning_rate: float) -> float:
        """The share in [0, 1] of the proposed step to take."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """The parts of one YAML, built."""

    name: str
    advantage: Advantage
    selection: Select
    token_loss: TokenLossFunction
    aggregation: Aggregation
    step_rule: StepRule
    num_iterations: int
    kl_coefficient: float


def build_algorithm(config: AlgoConfig) -> Algorithm:
    """Builds the parts.

    Raises:
        ConfigError: for an unknown or missing parameter, naming its key.
    """
    names = ("advantage", "selection", "token_loss", "aggregation", "step_rule")
    built = {name: parts.build(getattr(config, name), key=f"algo.{name}") for name in names}
    return Algorithm(
        name=config.name, num_iterations=config.num_iterations, kl_coefficient=config.kl_coefficient, **built
    )


def keep_all(shifts: TokenShifts, batch: Batch, log_probs: Tensor) -> Selection:
    """No selection: every completion token takes part."""
    del shifts, log_probs
    return Selection(batch.completion_mask)


def full_step(predicted: BatchShifts, learning_rate: float) -> float:
    """Takes the proposed step whole."""
    del predicted, learning_rate
    return 1.0


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token [nats]: exp(d) - 1 - d with d = ref - current; never
    negative.

    Source: Schulman 2020, "Approximating KL divergence"; GRPO, arXiv 2402.03300, eq. 4.
    """
    difference = ref_log_probs - log_probs
    return difference.exp() - 1 - difference
