"""Which tokens a selection rejects, and what rejecting them does to the optimiser step.

The step that training takes is compared with the same step with every token kept: another backward pass, and
the real optimiser from the same weights and moments, undone afterwards. Training never sees any of it.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import AdamState, Selection, StepRecord
from capo_exp.curvature import model as curvature

Metrics = dict[str, float]
Parts = Sequence[Tensor | None]
"""The parts of a vector over all weights: one a parameter; None where it takes no part in the loss."""
COMPARED = tuple(f"diagnosis/{x}/{y}" for x in ("gradient", "update") for y in ("cosine", "norm_ratio"))
"""What `comparison_metrics` returns."""


@dataclass(frozen=True)
class StepVector:
    """An optimiser step, real or imagined, as vectors over all weights."""

    gradients: Parts  # Clipped
    gradient_norm: float  # Before they were clipped
    update: Parts  # What the optimiser adds to the weights


@dataclass(frozen=True)
class Effect:
    """The policy after a step, real or imagined."""

    log_probs: Float[Tensor, "B T"]  # nats, of the step's completion tokens
    policy_shift: float  # Mean KL(policy before || after), nats, of a sample of them


def class_metrics(record: StepRecord, *, learning_rate: float, moments: AdamState | None) -> Metrics:
    """Says what the kept and the rejected tokens are like; NaN for a class without tokens. Rate and moments
    are those that the record's shifts were predicted with."""
    mask, columns = record.batch.completion_mask, _columns(record, learning_rate, moments)
    signal = record.batch.advantages.abs() * -record.output.log_probs.expm1()  # |A| (1 - p)
    metrics: Metrics = {}
    for name, tokens in _classes(record).items():
        means = {key: _mean(values, weights, tokens[mask]) for key, (values, weights) in columns.items()}
        part = masked_sum(signal, tokens).item() if tokens.any() else nan
        means["signal_share"] = _ratio(part, masked_sum(signal, mask).item())
        metrics |= {f"diagnosis/{name}/{key}": value for key, value in means.items()}
    return metrics


def changes_the_step(selection: Selection, completion_mask: Bool[Tensor, "B T"]) -> bool:
    """Returns whether a selection rejects a token or may weigh one down; if not, the step is the unmasked
    step itself."""
    return selection.weights is not None or bool((completion_mask & ~selection.keep_mask).any())


def comparison_metrics(real: StepVector, unmasked: StepVector) -> Metrics:
    """Compares the gradient and the update of a step with those of the same step with every token kept."""
    pairs = ((real.gradients, unmasked.gradients), (real.update, unmasked.update))
    lengths = [[sqrt(_dot(vector, vector)) for vector in pair] for pair in pairs]
    cosines = [_ratio(_dot(*pair), a * b) for pair, (a, b) in zip(pairs, lengths, strict=True)]
    norms = _ratio(real.gradient_norm, unmasked.gradient_norm), _ratio(*lengths[1])
    return dict(zip(COMPARED, (cosines[0], norms[0], cosines[1], norms[1]), strict=True))


def effect_metrics(record: StepRecord, effect: Effect, suffix: str = "") -> Metrics:
    """Says what a step, named by `suffix`, did to the tokens of its record; NaN for a class without
    tokens."""
    mask, advantages = record.batch.completion_mask, record.batch.advantages
    change = effect.log_probs - record.output.log_probs
    ones, signs = torch.ones_like(change), {"positive": advantages > 0, "negative": advantages < 0}
    metrics = {
        f"diagnosis/log_prob_change{suffix}/{name}_{sign}": _mean(change, ones, tokens & signed)
        for name, tokens in _classes(record).items()
        for sign, signed in signs.items()
    }
    metrics[f"diagnosis/policy_shift{suffix}"] = effect.policy_shift
    metrics[f"diagnosis/gain{suffix}"] = masked_mean(advantages * change.expm1(), mask).item()
    return metrics


@contextmanager
def imagined_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Lets the optimiser step, yields what that added to each weight, and undoes it, bit for bit.

    The optimiser works on a copy of its moments, so that the real ones are never written.
    """
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = optimizer.state
    copies = {parameter: copy.deepcopy(values) for parameter, values in moments.items()}
    optimizer.state = defaultdict(dict, copies)
    try:
        optimizer.step()
        yield [now.detach() - old for now, old in zip(model.parameters(), before, strict=True)]
    finally:
        optimizer.state = moments
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                parameter.copy_(old)


@contextmanager
def gradients_aside(model: PreTrainedModel) -> Iterator[Parts]:
    """Yields the gradients, leaves the model without any, and gives it the same tensors back."""
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        yield gradients
    finally:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient


def _classes(record: StepRecord) -> dict[str, Bool[Tensor, "B T"]]:
    """Returns two classes that together are all completion tokens."""
    mask, keep = record.batch.completion_mask, record.selection.keep_mask
    return {"kept": keep, "rejected": mask & ~keep}


def _columns(
    record: StepRecord, learning_rate: float, moments: AdamState | None
) -> dict[str, tuple[Float[Tensor, " N"], Float[Tensor, " N"]]]:
    """Returns values and weights [N] of the completion tokens: a class's metric is the sum of the values over
    the sum of the weights."""
    mask = record.batch.completion_mask
    ids, advantages = record.batch.token_ids[mask], record.batch.advantages[mask]
    one, ranks = torch.ones_like(advantages), mask.cumsum(1) - 1
    places = ranks / ranks[:, -1:].clamp(min=1)
    policy_shift, objective_shift = record.shifts.policy_shift[mask], record.shifts.objective_shift[mask]
    has_credit = (advantages != 0).float()
    momentum = torch.full_like(policy_shift, nan)  # m_F of the moments alone, as if no token had a gradient
    if moments is not None and moments.step > 0:
        still = curvature.pack_batch(
            record.output, record.batch, torch.zeros_like(record.batch.advantages), mask
        )
        momentum, _ = curvature.predict_shifts(still, learning_rate=learning_rate, state=moments)
    return {
        "probability": (record.output.log_probs[mask].exp(), one),
        "positive": ((advantages > 0).float(), one),
        "negative": ((advantages < 0).float(), one),
        "position": (places[mask], one),
        "frequency": (torch.bincount(ids)[ids] / len(ids), one),
        "agreement": ((objective_shift > 0) * has_credit, has_credit),
        "momentum": (momentum, policy_shift),
    }


def _mean(values: Tensor, weights: Tensor, members: Tensor) -> float:
    """Returns the sum of the members' values over the sum of their weights; NaN if that is 0."""
    return _ratio(masked_sum(values, members).item(), masked_sum(weights, members).item())


def _dot(first: Parts, second: Parts) -> float:
    """Adds up over all parameters, in float64."""
    pairs = zip(first, second, strict=True)
    return sum((a * b).sum(dtype=torch.float64).item() for a, b in pairs if a is not None and b is not None)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan
