"""What an algorithm is: pure functions and a few numbers.

conf/algo/*.yaml names them; this file says how they are called, in the order in which a rollout step calls
them, what a YAML leaves out is in neutral.py and does nothing.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from capo_exp.config.build import build_part, uses_reward_kl
from capo_exp.config.schema import AlgoConfig
from capo_exp.core.types import Batch, BatchTotals, Scored, Selection, TokenLoss
from capo_exp.curvature.step_trial import Decision, Proposal


class GroupFilter(Protocol):
    def __call__(self, rewards: Tensor) -> Tensor:
        """The verifier's rewards [P, G] -> [P] bool: which groups count as sampled."""
        ...


class Shaping(Protocol):
    def __call__(self, rewards: Tensor, lengths: Tensor, kl: Tensor) -> Tensor:
        """Rewards, completion tokens and summed kl_k1 to the reference, all [P, G] -> rewards [P, G]."""
        ...


class Advantage(Protocol):
    def __call__(self, rewards: Tensor) -> Tensor:
        """Rewards [P, G] -> advantages [P, G]."""
        ...


class Credit(Protocol):
    def __call__(self, advantages: Tensor, completion_mask: Tensor, kl: Tensor) -> Tensor:
        """Advantages [B], mask [B, T], kl_k1 to the reference [B, T] -> credit of each token [B, T]."""
        ...


class CompletionFilter(Protocol):
    def __call__(self, batch: Batch) -> Tensor:
        """[B] bool: which completions the learner sees at all."""
        ...


class Select(Protocol):
    def __call__(self, scored: Scored) -> Selection:
        """Which completion tokens take part in the update."""
        ...


class TokenLossFunction(Protocol):
    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor
    ) -> TokenLoss:
        """All [B, T] -> loss of each token [B, T], differentiable in log_probs."""
        ...


class KLEstimator(Protocol):
    def __call__(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        """[B, T], [B, T] -> estimate of KL(policy || reference) per token [B, T], differentiable."""
        ...


class Aggregation(Protocol):
    def __call__(self, values: Tensor, keep_mask: Tensor, batch: Batch, totals: BatchTotals) -> Tensor:
        """Token losses [B, T] -> this micro-batch's part of the step's scalar loss."""
        ...


class StepRule(Protocol):
    def __call__(self, proposal: Proposal) -> Decision:
        """The share of the proposed step to take."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """The parts of one YAML, built; the numbers are those of AlgoConfig."""

    name: str
    group_filter: GroupFilter
    shaping: Shaping
    advantage: Advantage
    credit: Credit
    completion_filter: CompletionFilter
    selection: Select
    token_loss: TokenLossFunction
    kl_estimator: KLEstimator
    aggregation: Aggregation
    step_rule: StepRule
    kl_coefficient: float
    kl_in_reward: bool
    scoring_pass: bool


PARTS = (
    "group_filter", "shaping", "advantage", "credit", "completion_filter", "selection", "token_loss",
    "kl_estimator", "aggregation", "step_rule",
)  # fmt: skip


def build_algorithm(config: AlgoConfig) -> Algorithm:
    """Builds the parts.

    Raises:
        ConfigError: for an unknown or missing parameter, naming its key.
    """
    built = {name: build_part(getattr(config, name), key=f"algo.{name}") for name in PARTS}
    return Algorithm(
        name=config.name,
        kl_coefficient=config.kl_coefficient,
        kl_in_reward=uses_reward_kl(config),
        scoring_pass=config.scoring_pass,
        **built,
    )
