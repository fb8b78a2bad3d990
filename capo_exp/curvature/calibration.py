"""Predicted against real: how far an optimiser step moved the policy and the surrogate, token by token.

A sample of tokens is scored over the whole vocabulary before the step, p_old = softmax(W h), and after it,
p_new = softmax(W' h'); also with the new last layer on the old states, softmax(W' h), the part of the move
that the last-layer model (`model`) can know of. The step is that of the whole batch, the prediction m_F
or m_H that of the token's own update; their rank correlation says how well the one stands for the other.

    policy shift     KL(p_old || p_new)               nats, over the vocabulary
    objective shift  A (p_new(a) / p_old(a) - 1)      reward units, of the sampled token a

Source: CAPO, arXiv 2510.00819, table 5.
"""

from dataclasses import dataclass, replace
from math import nan

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from capo_exp.core import policy
from capo_exp.core.batch import take
from capo_exp.core.policy import ForwardSettings
from capo_exp.core.types import Batch, StepRecord
from capo_exp.distributed.world import World

# Elements of one [tokens, V] working block: small beside the old log-probs, which are held whole.
_BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class SampleSize:
    """How many tokens an instrument looks at; they are drawn anew at every step."""

    completions: int  # Rows to draw at most
    tokens: int  # Completion tokens of these rows to draw at most


@dataclass(frozen=True)
class TokenSample:
    """A sample of n tokens as it was before an optimiser step; tokens in the order of the batch's rows."""

    batch: Batch  # The sampled completions; its completion_mask [b, T] holds the sampled tokens alone
    hidden: Float[Tensor, "n H"]  # float32 last-layer inputs, divided by the temperature
    log_probs: Float[Tensor, "n V"]  # nats, float32, at the training temperature
    token_ids: Int[Tensor, " n"]  # int64, the sampled tokens
    advantages: Float[Tensor, " n"]  # reward units
    policy_shift: Float[Tensor, " n"]  # m_F nats, predicted for the token's own update
    objective_shift: Float[Tensor, " n"]  # m_H reward units, likewise


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel, record: StepRecord, size: SampleSize, settings: ForwardSettings, *, seed: int
) -> TokenSample:
    """Draws the sample and scores it; call it before the optimiser steps. The sample is a function of the
    seed and of the record's completion_mask without padding columns.

    The states are made anew and not read from the record: the record's come from micro-batches of other
    shapes, which in bfloat16 round differently, up to 1e-7 nats in the mean: what a typical token moves.
    """
    rows, batch = _draw_rows(record, size, seed)
    return _describe(model, record, rows, batch, _states(model, batch, settings))


@torch.no_grad()
def sample_recorded_tokens(
    model: PreTrainedModel, record: StepRecord, size: SampleSize, world: World, *, seed: int
) -> TokenSample:
    """Draws the same sample with the record's own states: no forward pass, for moves of the last layer only.
    The states have to be those that logits = W h holds for."""
    rows, batch = _draw_rows(record, size, seed)
    length = batch.completion_mask.shape[1]
    hidden = world.sum(_recorded_states(record, rows)[:, :length][batch.completion_mask])
    return _describe(model, record, rows, batch, hidden)


def _recorded_states(record: StepRecord, rows: Int[Tensor, " b"]) -> Float[Tensor, "b T H"]:
    """Returns the hidden states of these rows, 0 where another process has them."""
    hidden, own = record.output.hidden, record.output.rows
    if own is None:
        return hidden[rows]
    states = hidden.new_zeros(len(rows), *hidden.shape[1:])
    here = torch.isin(rows, own)
    states[here] = hidden[torch.searchsorted(own, rows[here])]
    return states


def _draw_rows(record: StepRecord, size: SampleSize, seed: int) -> tuple[Tensor, Batch]:
    """Returns row numbers [b], ascending, and the rows with a completion_mask of the sampled tokens alone;
    drawn on the CPU, so that every device draws the same."""
    mask, generator = record.batch.completion_mask, torch.Generator().manual_seed(seed)
    order = torch.randperm(len(mask), generator=generator)[: size.completions]
    rows = order.sort().values.to(mask.device)
    places = mask[rows].nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[: size.tokens].to(mask.device)]
    sampled = torch.zeros_like(mask[rows])
    sampled[chosen[:, 0], chosen[:, 1]] = True
    return rows, replace(take(record.batch, rows), completion_mask=sampled)


def _describe(
    model: PreTrainedModel, record: StepRecord, rows: Tensor, batch: Batch, hidden: Float[Tensor, "n H"]
) -> TokenSample:
    sampled, weight = batch.completion_mask, policy.head_weight(model)
    return TokenSample(
        batch=batch,
        hidden=hidden,
        log_probs=torch.cat([_log_probs(weight, part) for part in hidden.split(_block(weight))]),
        token_ids=batch.token_ids[sampled],
        advantages=batch.advantages[sampled],
        policy_shift=record.shifts.policy_shift[rows][sampled],
        objective_shift=record.shifts.objective_shift[rows][sampled],
    )


@torch.no_grad()
def calibration_metrics(
    model: PreTrainedModel, sample: TokenSample, settings: ForwardSettings, *, predicted: float
) -> dict[str, float]:
    """Returns means over the sampled tokens and Spearman correlations, NaN where undefined; call it after the
    step. `predicted` is the policy shift [nats] of the whole update, before any step rule has scaled it."""
    weight = policy.head_weight(model)
    full = _move(weight, _states(model, sample.batch, settings), sample)
    last_layer = _move(weight, sample.hidden, sample)
    metrics = {"calibration/tokens": float(len(sample.hidden))}
    predictions = (sample.policy_shift, sample.objective_shift)
    for kind, own, real, alone in zip(("policy", "objective"), predictions, full, last_layer, strict=True):
        metrics |= {
            f"calibration/{kind}_shift/measured": real.mean().item(),
            f"calibration/{kind}_shift/last_layer": alone.mean().item(),
            f"calibration/{kind}_shift/spearman": spearman(own, real),
            f"calibration/{kind}_shift/last_layer_spearman": spearman(own, alone),
        }
    return metrics | {
        "calibration/last_layer/spearman": spearman(last_layer[0], full[0]),
        "calibration/entropy/spearman": spearman(_entropy(sample.log_probs), full[0]),
        "calibration/ratio": full[0].mean().item() / predicted if predicted else nan,
    }


@torch.no_grad()
def policy_move(model: PreTrainedModel, sample: TokenSample, settings: ForwardSettings) -> float:
    """Measures the mean KL(p_old || p_new) [nats a token] of the model as it is now."""
    hidden = _states(model, sample.batch, settings)
    return _move(policy.head_weight(model), hidden, sample)[0].mean().item()


@torch.no_grad()
def last_layer_move(weight: Float[Tensor, "V H"], sample: TokenSample) -> float:
    """Measures the mean KL(p_old || p_new) [nats a token] if the last layer became `weight` and nothing else
    moved."""
    return _move(weight, sample.hidden, sample)[0].mean().item()


def spearman(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Returns the rank correlation, ties at their mean rank; NaN for fewer than 3 values or where either does
    not vary."""
    if len(first) < 3 or (first == first[0]).all() or (second == second[0]).all():
        return nan
    from scipy.stats import spearmanr  # half a second, which every start of a run would wait for

    result = spearmanr(first.cpu().numpy(), second.cpu().numpy())
    return float(result.statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _entropy(log_probs: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Returns [n] nats, made a token at a time, for the blocks of the vocabulary are large."""
    return torch.stack([-(row.exp() * row).nan_to_num().sum() for row in log_probs])


def _states(model: PreTrainedModel, batch: Batch, settings: ForwardSettings) -> Float[Tensor, "n H"]:
    """Returns the last-layer inputs of the batch's marked tokens, the only ones that forward makes logits
    of."""
    return policy.forward(model, batch, settings, top_k=1).hidden[batch.completion_mask]


def _move(
    weight: Float[Tensor, "V H"], hidden: Float[Tensor, "n H"], sample: TokenSample
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Measures what each token's policy [nats] and objective [reward units] did, float64, from the sample to
    a last layer on `hidden`."""
    columns = (hidden, sample.log_probs, sample.token_ids[:, None])
    kls: list[Tensor] = []
    gains: list[Tensor] = []
    for states, old, chosen in zip(*(column.split(_block(weight)) for column in columns), strict=True):
        new = _log_probs(weight, states)
        kls.append(_kl(old, new))
        gains.append((new.gather(1, chosen).double() - old.gather(1, chosen)).squeeze(1).expm1())
    return torch.cat(kls), sample.advantages * torch.cat(gains)


def _kl(old: Float[Tensor, "n V"], new: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Returns KL(p || q) of log-probs, old p and new q, as sum (q - p - p d) with d = log q - log p.

    It equals -sum p d, because both sum to 1, but its terms are of second order and so is their rounding;
    -sum p d in float32 is uncertain by 1e-7 nats, as much as a typical token moves. float64, because q and p
    cancel.
    """
    old, new = old.double(), new.double()
    change = new - old
    p, q = old.exp_(), new.exp_()
    return (q - p).addcmul_(p, change, value=-1).sum(1)


def _log_probs(weight: Float[Tensor, "V H"], hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
    """Returns float32 log-probs, outside of any autocast."""
    return linear(hidden, weight.float()).log_softmax(1)


def _block(weight: Float[Tensor, "V H"]) -> int:
    """Returns how many tokens are scored at once; the same before and after, so that both round alike."""
    return max(1, _BLOCK_ELEMENTS // len(weight))
