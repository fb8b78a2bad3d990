"""What an algorithm is: pure functions and a few numbers.

conf/algo/*.yaml names them; this file says how they are called, in the order in which a rollout step calls
them, what a YAML leaves out is in neutral.py and does nothing. A group filter, an advantage and a credit may
have parameters beside these, named as in config/declare.py: OFFERS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor

from capo_exp.config.build import build_part
from capo_exp.config.declare import declares
from capo_exp.config.schema import AlgoConfig
from capo_exp.core.step import StepDecision, StepTrial
from capo_exp.core.types import Batch, BatchTotals, Scored, Selection, TokenLoss, TokenLossInput

GroupFilter = Callable[..., Tensor]
"""The verifier's rewards [P, G] -> [P] bool: which groups count as sampled."""
States = Callable[[Sequence[str]], list[int]]
"""Texts of a completion's tokens -> before which of them (0 = the prompt) the value of a state is wanted."""
Shaping = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rewards, completion tokens and summed kl_k1 to the reference, all [P, G] -> rewards [P, G]."""
Advantage = Callable[..., Tensor]
"""Rewards [P, G] -> advantages [P, G]."""
Credit = Callable[..., Tensor]
"""Advantages [B], completion_mask [B, T], kl_k1 to the reference [B, T] -> credit of each token [B, T]."""
CompletionFilter = Callable[[Batch], Tensor]
"""[B] bool: which completions the learner sees at all."""
Select = Callable[[Scored], Selection]
"""Which completion tokens take part in the update."""
TokenLossFunction = Callable[[TokenLossInput], TokenLoss]
"""What may be seen of a micro-batch, and of its step with `whole_step` -> loss of each token [B, T],
differentiable in log_probs."""
KLEstimator = Callable[[Tensor, Tensor], Tensor]
"""log_probs, ref_log_probs [B, T] -> estimate of KL(policy || reference) per token [B, T], differentiable."""
Aggregation = Callable[[Tensor, Tensor, Batch, BatchTotals], Tensor]
"""Token losses [B, T], keep_mask [B, T] -> this micro-batch's part of the step's scalar loss."""
StepRule = Callable[[StepTrial], StepDecision]
"""How much of the proposed step to take; the trial shows what a part of it would do."""


@dataclass(frozen=True)
class Algorithm:
    """All that one YAML of conf/algo says: its parts, built, and its numbers, whose meanings are in
    AlgoConfig."""

    name: str
    group_filter: GroupFilter
    max_sampling_rounds: int
    rollout_tokens: int | None
    max_age: int
    reference_samples: int
    continuations: int
    states: States
    pair_levels: list[str]
    shaping: Shaping
    advantage: Advantage
    credit: Credit
    completion_filter: CompletionFilter
    filter_denominator: str
    num_iterations: int
    num_minibatches: int
    selection: Select
    token_loss: TokenLossFunction
    kl_estimator: KLEstimator
    kl_coefficient: float
    reference_reset_every: int
    optimizer_reset_every: int
    aggregation: Aggregation
    step_rule: StepRule

    @property
    def scoring_pass(self) -> bool:
        """Whether a part has to see the whole optimiser step before the first gradient."""
        parts = (self.selection, self.token_loss, self.aggregation)
        return any(declares_inside(part, "whole_step") for part in parts)

    @property
    def uses_reward_kl(self) -> bool:
        """Whether rewards or credit use the KL to the reference."""
        return any(map(_uses_kl, (self.shaping, self.credit)))

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference model has to be there."""
        in_loss = declares_inside(self.token_loss, "needs_reference")
        return self.kl_coefficient > 0 or self.uses_reward_kl or in_loss


def build_algorithm(config: AlgoConfig) -> Algorithm:
    """Builds the parts.

    Raises:
        ConfigError: for an unknown or missing parameter, naming its key.
    """
    values = {field.name: getattr(config, field.name) for field in fields(Algorithm)}
    return Algorithm(
        **{
            name: build_part(value, key=f"algo.{name}") if isinstance(value, dict) else value
            for name, value in values.items()
        }
    )


def declares_inside(part: Callable[..., object], what: str) -> bool:
    """Returns whether a part, or one that it was given, declares something, such as `whole_step`."""
    inside = part.keywords.values() if isinstance(part, partial) else ()
    return bool(declares(part, what)) or any(declares_inside(each, what) for each in inside if callable(each))


def _uses_kl(part: Callable[..., Tensor]) -> bool:
    number = declares(part, "needs_kl")
    numbers = part.keywords if isinstance(part, partial) else {}
    return number is not None and numbers.get(number) != 0
