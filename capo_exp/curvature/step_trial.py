"""A proposed optimiser step that can be looked at before it is taken: what would a share of it do?

AdamW's step is linear in its learning rate, weight decay included, so a share of the step is the step at that
share of the rate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from capo_exp.core import policy
from capo_exp.core.types import BatchShifts, StepRecord
from capo_exp.curvature import calibration

Memory = Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """The completion tokens that a shift is the mean over, drawn anew at every step."""

    completions: int
    tokens: int


class Trial:
    """The whole step, made on the model; settle takes back what is not wanted. Keeps a copy of weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        record: StepRecord,
        sample: Sample,
        *,
        seed: int,
        measurable: bool,
        states_on_record: bool,
        forward_numbers: Mapping[str, Any],
    ) -> None:
        """Makes the step.

        Args:
            model: with gradients.
            optimizer: its groups' `lr` is that of the whole step.
            record: what the step saw.
            sample: tokens to look at.
            seed: of the sample.
            measurable: whether `measured` will be asked; takes a forward pass over the sampled completions.
            states_on_record: whether the record's hidden states are those of its logits; if not, that pass.
            forward_numbers: of policy.forward, top_k left out.
        """
        self._model = model
        self._numbers = dict(forward_numbers)
        fresh = measurable or not states_on_record
        draw = partial(calibration.take_probe, **self._numbers) if fresh else calibration.read_probe
        self._probe = draw(model, record, completions=sample.completions, tokens=sample.tokens, seed=seed)
        self._before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        self._measurable = measurable
        self._share = 1.0
        self._head = policy.last_layer(model).weight.detach().clone()

    @torch.no_grad()
    def last_layer(self, share: float) -> float:
        """Mean KL(before || after) [nats a token] if the last layer alone moved, by a share of the step."""
        head = policy.last_layer(self._model).weight
        (before,) = (
            old for old, now in zip(self._before, self._model.parameters(), strict=True) if now is head
        )
        return calibration.last_layer_move(torch.lerp(before, self._head, share), self._probe)

    @torch.no_grad()
    def measured(self, share: float) -> float:
        """Mean KL(before || after) [nats a token] of the model after a share of the step; a forward pass."""
        assert self._measurable
        self.settle(share)
        return calibration.policy_move(self._model, self._probe, **self._numbers)

    @torch.no_grad()
    def settle(self, share: float) -> None:
        """Gives the model the weights after a share of the step.

        Raises:
            AssertionError: after a share of 0, which forgets the step.
        """
        if share == self._share:
            return
        assert self._share > 0
        for parameter, before in zip(self._model.parameters(), self._before, strict=True):
            parameter.copy_(before if share == 0 else torch.lerp(before, parameter, share / self._share))
        self._share = share


@dataclass(frozen=True)
class Proposal:
    """What a step rule decides about."""

    predicted: BatchShifts
    """By the optimiser model, for the whole step."""
    learning_rate: float
    """Of the whole step."""
    memory: Memory
    """What the rule kept of the steps before; empty at the first."""
    make: Callable[[Sample, bool], Trial]
    """(sample, measurable) -> the step, made; see Trial. At most once."""


@dataclass(frozen=True)
class Decision:
    """What a step rule decided."""

    share: float
    """In [0, 1], of the proposed step."""
    memory: Memory = field(default_factory=dict[str, float])
    """For the next step; saved with checkpoints."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """What it saw on the way."""
