"""A proposed optimiser step that can be looked at before it is settled: what would a part of it do?

AdamW's step is linear in its learning rate, weight decay included, so `step_scale` times the step is the step
at that multiple of the rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.core import policy
from capo_exp.core.policy import ForwardSettings
from capo_exp.core.types import BatchShifts, StepRecord
from capo_exp.curvature.calibration import (
    SampleSize,
    last_layer_move,
    policy_move,
    sample_recorded_tokens,
    sample_tokens,
)
from capo_exp.distributed.sharding import full
from capo_exp.distributed.world import World


@dataclass(frozen=True)
class ProposedStep:
    """What is known of an optimiser step before it is taken."""

    record: StepRecord  # What the step saw
    predicted: BatchShifts  # By the optimiser model, for the whole step
    learning_rate: float  # Of the whole step
    settings: ForwardSettings  # Of forward passes that measure
    states_on_record: bool
    """Whether the record's hidden states are those of its logits; if not, a sample takes a forward pass."""
    memory: Mapping[str, float]  # What the step rule kept of the steps before; empty at the first
    seed: int  # Of the sample of tokens


@dataclass(frozen=True)
class StepDecision:
    """What a step rule decided."""

    step_scale: float  # In [0, 1], how much of the proposed step to take
    memory: Mapping[str, float] = field(default_factory=dict[str, float])
    """For the next step; saved with checkpoints."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # What the rule saw on the way


class StepTrial:
    """The step on the model: a rule may `take` it whole and look at parts of it; `settle` ends with the part
    that is wanted. A step that no rule takes costs no copy of the weights."""

    def __init__(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, proposed: ProposedStep, world: World
    ) -> None:
        """Changes nothing yet; the model has gradients, and the optimiser the rate of the whole step."""
        self.proposed = proposed
        self._world = world
        self._model = model
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self._step_scale = 0.0

    def take(self, size: SampleSize, *, measurable: bool) -> None:
        """Draws the tokens that a shift is the mean over, keeps a copy of the weights, and takes the whole
        step; at most once. `measured` may be asked later if `measurable`, which takes a forward pass."""
        assert not self._before, "a step is taken once"
        step, self._measurable = self.proposed, measurable
        if measurable or not step.states_on_record:
            self._sample = sample_tokens(self._model, step.record, size, step.settings, seed=step.seed)
        else:
            self._sample = sample_recorded_tokens(self._model, step.record, size, self._world, seed=step.seed)
        self._before = [parameter.detach().clone() for parameter in self._model.parameters()]
        self._optimizer.step()
        self._step_scale = 1.0
        self._head = policy.last_layer(self._model).weight.detach().clone()

    @torch.no_grad()
    def last_layer(self, step_scale: float) -> float:
        """Predicts the mean KL(before || after) [nats a token] if the last layer alone moved, by a part of
        the step."""
        head = policy.last_layer(self._model).weight
        (before,) = (
            old for old, now in zip(self._before, self._model.parameters(), strict=True) if now is head
        )
        move = last_layer_move(full(torch.lerp(before, self._head, step_scale)), self._sample)
        return self._world.first(lambda: move)  # so that all decide alike, whatever their GPUs round

    @torch.no_grad()
    def measured(self, step_scale: float) -> float:
        """Measures the mean KL(before || after) [nats a token] of the model after a part of the step; takes a
        forward pass."""
        assert self._measurable
        self.settle(step_scale)
        move = policy_move(self._model, self._sample, self.proposed.settings)
        return self._world.first(lambda: move)

    @torch.no_grad()
    def settle(self, step_scale: float) -> None:
        """Gives the model the weights after a part of the step, of one not taken yet, too; a part of 0
        forgets the step."""
        if not self._before:
            for group in self._optimizer.param_groups:
                group["lr"] = step_scale * self.proposed.learning_rate
            self._optimizer.step()
            return
        if step_scale == self._step_scale:
            return
        assert self._step_scale > 0
        for parameter, before in zip(self._model.parameters(), self._before, strict=True):
            part = step_scale / self._step_scale
            parameter.copy_(torch.lerp(before, parameter, part) if part else before)
        self._step_scale = step_scale
