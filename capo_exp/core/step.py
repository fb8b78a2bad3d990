"""An optimiser step before it is settled: what a step rule sees of it, and what it decides."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from capo_exp.core.types import BatchShifts, StepRecord


@dataclass(frozen=True)
class ProposedStep:
    """What is known of an optimiser step before it is taken."""

    record: StepRecord  # What the step saw
    predicted: BatchShifts  # By the optimiser model, for the whole step
    learning_rate: float  # Of the whole step
    memory: Mapping[str, float]  # What the step rule kept of the steps before; empty at the first


class StepTrial(ABC):
    """The proposed step, of which a rule may take a part and look at others."""

    proposed: ProposedStep

    @abstractmethod
    def take(self, *, completions: int, tokens: int, step_scale: float = 1.0) -> None:
        """Draws the tokens that a shift is the mean over, of `completions` rows at most, and takes a part of
        the step, above 0; at most once. Looks at that part cost least."""

    @abstractmethod
    def last_layer(self, step_scale: float) -> float:
        """Predicts the mean KL(before || after) [nats a token] if the last layer alone moved, by a part of
        the step."""

    @abstractmethod
    def measured(self, step_scale: float) -> float:
        """Measures the mean KL(before || after) [nats a token] of the model after a part of the step; takes a
        forward pass."""


@dataclass(frozen=True)
class StepDecision:
    """What a step rule decided."""

    step_scale: float  # In [0, 1], how much of the proposed step to take
    memory: Mapping[str, float] = field(default_factory=dict[str, float])
    """For the next step; saved with checkpoints."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # What the rule saw on the way
