"""Predicted against real: how far an optimiser step moved the policy and the surrogate, token by token.

A sample of tokens is scored over the whole vocabulary before the step, p_old = softmax(W h), and after it,
p_new = softmax(W' h'); also with the new last layer on the old states, softmax(W' h), the part of the move
that the last-layer model of curvature.py can know of. The step is that of the whole batch, the prediction m_F
or m_H that of the token's own update; their rank correlation says how well the one stands for the other.

    policy shift     KL(p_old || p_new)               nats, over the vocabulary
    objective shift  A (p_new(a) / p_old(a) - 1)      reward units, of the sampled token a

Source: CAPO, arXiv 2510.00819, table 5.
"""

from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from capo_exp.core import policy
from capo_exp.core.batch import take
from capo_exp.core.types import Batch, BatchShifts, StepRecord

# Elements of one [tokens, V] working block: small beside the old log-probs, which are held whole.
_BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Probe:
    """A sample of n tokens as it was before an optimiser step; tokens in the order of the batch's rows."""

    batch: Batch
    """The sampled completions; its completion_mask [b, T] holds the sampled tokens alone."""
    hidden: Float[Tensor, "n H"]
    """[n, H] float32 last-layer inputs, divided by the temperature."""
    log_probs: Float[Tensor, "n V"]
    """[n, V] nats, float32, at the training temperature."""
    token_ids: Int[Tensor, " n"]
    """[n] int64, the sampled tokens."""
    advantages: Float[Tensor, " n"]
    """[n] reward units."""
    policy_shift: Float[Tensor, " n"]
    """[n] m_F nats, predicted for the token's own update."""
    objective_shift: Float[Tensor, " n"]
    """[n] m_H reward units, likewise."""


@dataclass(frozen=True)
class _Move:
    """What happened to each token of a probe."""

    policy: Float[Tensor, " n"]  # nats, float64
    objective: Float[Tensor, " n"]  # reward units, float64


@torch.no_grad()
def take_probe(
    model: PreTrainedModel,
    record: StepRecord,
    *,
    completions: int,
    tokens: int,
    seed: int,
    **forward_numbers: Any,
) -> Probe:
    """Draws the sample and scores it; call it before the optimiser steps.

    The states are made anew and not read from the record: the record's come from micro-batches of other
    shapes, which in bfloat16 round differently, up to 1e-7 nats in the mean: what a typical token moves.

    Args:
        model: with the weights from before the step.
        record: what the step saw, in the order of the batch's rows.
        completions: rows to draw at most.
        tokens: completion tokens of these rows to draw at most.
        seed: the sample is a function of it and of the record's completion_mask without padding columns.
        forward_numbers: of policy.forward, top_k left out; the hidden states have to be those that logits =
            W h holds for.
    """
    rows, batch = _sample(record, completions, tokens, seed)
    return _probe(model, record, rows, batch, _states(model, batch, **forward_numbers))


@torch.no_grad()
def read_probe(
    model: PreTrainedModel, record: StepRecord, *, completions: int, tokens: int, seed: int
) -> Probe:
    """The same sample with the record's own states: no forward pass, for moves of the last layer only."""
    rows, batch = _sample(record, completions, tokens, seed)
    length = batch.completion_mask.shape[1]
    hidden = record.output.hidden[rows, :length][batch.completion_mask]
    return _probe(model, record, rows, batch, hidden)


def _sample(record: StepRecord, completions: int, tokens: int, seed: int) -> tuple[Tensor, Batch]:
    """Row numbers, and the rows with a completion_mask of the sampled tokens alone."""
    generator = torch.Generator().manual_seed(seed)
    rows, sampled = _draw(record.batch.completion_mask, completions, tokens, generator)
    return rows, replace(take(record.batch, rows), completion_mask=sampled)


def _probe(
    model: PreTrainedModel, record: StepRecord, rows: Tensor, batch: Batch, hidden: Float[Tensor, "n H"]
) -> Probe:
    sampled, head = batch.completion_mask, policy.last_layer(model)
    return Probe(
        batch=batch,
        hidden=hidden,
        log_probs=torch.cat([_log_probs(head.weight, part) for part in hidden.split(_block(head.weight))]),
        token_ids=batch.token_ids[sampled],
        advantages=batch.advantages[sampled],
        policy_shift=record.shifts.policy_shift[rows][sampled],
        objective_shift=record.shifts.objective_shift[rows][sampled],
    )


@torch.no_grad()
def measure(
    model: PreTrainedModel, probe: Probe, predicted: BatchShifts, **forward_numbers: Any
) -> dict[str, float]:
    """The calibration metrics of an optimiser step; call it after the step.

    Args:
        model: with the weights from after the step.
        probe: taken before it.
        predicted: of the whole update, before any step rule has scaled it.
        forward_numbers: those that the probe was taken with.

    Returns:
        Means over the sampled tokens and Spearman correlations; NaN where undefined.
    """
    weight = policy.last_layer(model).weight
    full = _move(weight, _states(model, probe.batch, **forward_numbers), probe)
    last_layer = _move(weight, probe.hidden, probe)
    kl = full.policy.mean().item()
    return {
        "calibration/tokens": float(len(probe.hidden)),
        **_compare("calibration/policy_shift", probe.policy_shift, full.policy, last_layer.policy),
        **_compare(
            "calibration/objective_shift", probe.objective_shift, full.objective, last_layer.objective
        ),
        "calibration/last_layer/spearman": spearman(last_layer.policy, full.policy),
        "calibration/entropy/spearman": spearman(_entropy(probe.log_probs), full.policy),
        "calibration/ratio": kl / predicted.policy_shift if predicted.policy_shift else nan,
    }


@torch.no_grad()
def policy_move(model: PreTrainedModel, probe: Probe, **forward_numbers: Any) -> float:
    """Mean KL(p_old || p_new) [nats a token] of the model as it is now."""
    hidden = _states(model, probe.batch, **forward_numbers)
    return _move(policy.last_layer(model).weight, hidden, probe).policy.mean().item()


@torch.no_grad()
def last_layer_move(weight: Float[Tensor, "V H"], probe: Probe) -> float:
    """Mean KL(p_old || p_new) [nats a token] if the last layer became `weight` and nothing else moved."""
    return _move(weight, probe.hidden, probe).policy.mean().item()


def spearman(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than 3 values or where either does not
    vary."""
    if len(first) < 3 or (first == first[0]).all() or (second == second[0]).all():
        return nan
    result = spearmanr(first.cpu().numpy(), second.cpu().numpy())
    return float(result.statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _entropy(log_probs: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """[n] nats; a token at a time, for the blocks of the vocabulary are large."""
    return torch.stack([-(row.exp() * row).nan_to_num().sum() for row in log_probs])


def _compare(name: str, predicted: Tensor, measured: Tensor, last_layer: Tensor) -> dict[str, float]:
    return {
        f"{name}/measured": measured.mean().item(),
        f"{name}/last_layer": last_layer.mean().item(),
        f"{name}/spearman": spearman(predicted, measured),
        f"{name}/last_layer_spearman": spearman(predicted, last_layer),
    }


def _draw(mask: Tensor, completions: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row numbers [b], ascending, and which of their tokens [b, T] bool; a CPU generator, so that every
    device draws the same."""
    order = torch.randperm(len(mask), generator=generator)[:completions]
    rows = order.sort().values.to(mask.device)
    places = mask[rows].nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[:tokens].to(mask.device)]
    sampled = torch.zeros_like(mask[rows])
    sampled[chosen[:, 0], chosen[:, 1]] = True
    return rows, sampled


def _states(model: PreTrainedModel, batch: Batch, **forward_numbers: Any) -> Float[Tensor, "n H"]:
    """The last-layer inputs of the batch's marked tokens, the only ones that forward makes logits of."""
    return policy.forward(model, batch, top_k=1, **forward_numbers).hidden[batch.completion_mask]


def _move(weight: Float[Tensor, "V H"], hidden: Float[Tensor, "n H"], probe: Probe) -> _Move:
    """From the probe to a last layer on `hidden`."""
    columns = (hidden, probe.log_probs, probe.token_ids[:, None])
    kls: list[Tensor] = []
    gains: list[Tensor] = []
    for states, old, chosen in zip(*(column.split(_block(weight)) for column in columns), strict=True):
        new = _log_probs(weight, states)
        kls.append(_kl(old, new))
        gains.append((new.gather(1, chosen).double() - old.gather(1, chosen)).squeeze(1).expm1())
    return _Move(torch.cat(kls), probe.advantages * torch.cat(gains))


def _kl(old: Float[Tensor, "n V"], new: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(p || q) of log-probs, old p and new q, as sum (q - p - p d) with d = log q - log p.

    It equals -sum p d, because both sum to 1, but its terms are of second order and so is their rounding;
    -sum p d in float32 is uncertain by 1e-7 nats, as much as a typical token moves. float64, because q and p
    cancel.
    """
    old, new = old.double(), new.double()
    change = new - old
    p, q = old.exp_(), new.exp_()
    return (q - p).addcmul_(p, change, value=-1).sum(1)


def _log_probs(weight: Float[Tensor, "V H"], hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
    """float32, outside of any autocast."""
    return linear(hidden, weight).log_softmax(1)


def _block(weight: Float[Tensor, "V H"]) -> int:
    """Tokens scored at once; the same before and after, so that both round alike."""
    return max(1, _BLOCK_ELEMENTS // len(weight))
