"""A proposed optimiser step that can be looked at before it is settled: what would a part of it do?

AdamW's step is linear in its learning rate, weight decay included, so `step_scale` times the step is the step
at that multiple of the rate.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.core import policy
from capo_exp.core.policy import ForwardSettings
from capo_exp.core.step import ProposedStep, StepTrial
from capo_exp.curvature.calibration import (
    SampleSize,
    last_layer_move,
    policy_move,
    sample_recorded_tokens,
    sample_tokens,
)
from capo_exp.distributed.sharding import full
from capo_exp.distributed.world import World


class ModelStepTrial(StepTrial):
    """The step on the model: a rule may `take` a part and look at others; `settle` ends with the part
    that is wanted. A step that no rule takes costs no copy of the weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        proposed: ProposedStep,
        settings: ForwardSettings,
        world: World,
        *,
        states_on_record: bool,
        seed: int,
    ) -> None:
        """Changes nothing yet; the model has gradients, and the optimiser the rate of the whole step. If the
        record's hidden states are not those of its logits, a sample takes a forward pass; `seed` draws it."""
        self.proposed = proposed
        self._settings, self._world = settings, world
        self._model, self._optimizer = model, optimizer
        self._states_on_record, self._seed = states_on_record, seed
        self._before: list[Tensor] = []
        self._step_scale = 0.0

    def take(self, *, completions: int, tokens: int, step_scale: float = 1.0) -> None:
        """Draws the sample, keeps a copy of the weights, and takes the part of the step."""
        assert not self._before, "a step is taken once"
        record, size = self.proposed.record, SampleSize(completions, tokens)
        if self._states_on_record:
            self._sample = sample_recorded_tokens(self._model, record, size, self._world, seed=self._seed)
        else:
            self._sample = sample_tokens(self._model, record, size, self._settings, seed=self._seed)
        self._before = [parameter.detach().clone() for parameter in self._model.parameters()]
        self._step(step_scale)
        self._step_scale = self._taken = step_scale
        self._head = policy.last_layer(self._model).weight.detach().clone()

    @torch.no_grad()
    def last_layer(self, step_scale: float) -> float:
        """Predicts the mean KL if the last layer alone moved, by a part of the step."""
        head = policy.last_layer(self._model).weight
        (before,) = (
            old for old, now in zip(self._before, self._model.parameters(), strict=True) if now is head
        )
        moved = torch.lerp(before, self._head, step_scale / self._taken)
        move = last_layer_move(full(moved), self._sample)
        return self._world.first(lambda: move)  # so that all decide alike, whatever their GPUs round

    @torch.no_grad()
    def measured(self, step_scale: float) -> float:
        """Measures the mean KL after a part of the step."""
        self.settle(step_scale)
        move = policy_move(self._model, self._sample, self._settings)
        return self._world.first(lambda: move)

    @torch.no_grad()
    def settle(self, step_scale: float) -> None:
        """Gives the model the weights after a part of the step, of one not taken yet, too; a part of 0
        forgets the step."""
        if not self._before:
            self._step(step_scale)
            return
        if step_scale == self._step_scale:
            return
        assert self._step_scale > 0
        part = step_scale / self._step_scale
        for parameter, before in zip(self._model.parameters(), self._before, strict=True):
            parameter.lerp_(before, 1 - part) if part else parameter.copy_(before)
        self._step_scale = step_scale

    def _step(self, step_scale: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = step_scale * self.proposed.learning_rate
        self._optimizer.step()
