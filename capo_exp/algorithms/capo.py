"""CAPO: curvature-aware policy optimisation (arXiv 2510.00819), its bounds at every level."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import TypedDict

import torch
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegativeOrInf, NotNan
from capo_exp.config.declare import ordered, whole_step
from capo_exp.core.types import BatchShifts, Scored, Selection, TokenShifts
from capo_exp.curvature import model as curvature


class Bounds(TypedDict):
    """The bounds of one level."""

    policy_shift_max: NonNegativeOrInf
    objective_shift_min: NotNan
    objective_shift_max: NotNan


@ordered("objective_shift_min", "objective_shift_max")
def shift_bounds(
    scored: Scored,
    *,
    policy_shift_max: NonNegativeOrInf,
    objective_shift_min: NotNan,
    objective_shift_max: NotNan,
) -> Selection:
    """Keeps tokens with m_F < policy_shift_max and objective_shift_min < m_H < objective_shift_max.

    An infinite bound switches a test off. A token whose shift is NaN is rejected. At rate 0 nothing moves and
    m_H is 0: a positive objective_shift_min does not count then. Source: arXiv 2510.00819, section 5,
    practical rule; strict inequalities as in the authors' program.
    """
    objective_shift, least = scored.shifts.objective_shift, objective_shift_min
    if scored.learning_rate == 0 and least >= 0:
        least = -inf
    policy_ok = scored.shifts.policy_shift < policy_shift_max
    return _reject(scored, ~policy_ok, ~((objective_shift > least) & (objective_shift < objective_shift_max)))


@ordered("objective_shift_min", "objective_shift_max")
def completion_bounds(
    scored: Scored,
    *,
    policy_shift_max: NonNegativeOrInf,
    objective_shift_min: NotNan,
    objective_shift_max: NotNan,
) -> Selection:
    """Applies the same test to the shifts of each completion's mean update; rejects whole completions.

    Source: the authors' "sentence" level, with their m_H, in which every vocabulary row weighs the same.
    """
    return shift_bounds(
        _at_level(scored, curvature.completion_shifts),
        policy_shift_max=policy_shift_max,
        objective_shift_min=objective_shift_min,
        objective_shift_max=objective_shift_max,
    )


@whole_step
@ordered("objective_shift_min", "objective_shift_max")
def batch_bounds(
    scored: Scored,
    *,
    policy_shift_max: NonNegativeOrInf,
    objective_shift_min: NotNan,
    objective_shift_max: NotNan,
) -> Selection:
    """Applies the same test to the shifts of the whole step's mean update; keeps all or nothing.

    Source: the authors' "global" level, with their m_H (objective_shift_by_row), which is no prediction.
    """
    return shift_bounds(
        _at_level(scored, curvature.whole_shifts),
        policy_shift_max=policy_shift_max,
        objective_shift_min=objective_shift_min,
        objective_shift_max=objective_shift_max,
    )


@whole_step
def bounds_in_sequence(scored: Scored, *, token: Bounds, completion: Bounds, batch: Bounds) -> Selection:
    """Applies token, completion and batch bounds one after another, each to the tokens that the ones before
    kept, with shifts predicted anew. Ours: the authors' "sequential masking" logs such shifts, but decides by
    the first."""
    levels, remaining, seen = _levels(token, completion, batch), scored, list[Selection]()
    for level in levels:
        seen.append(level(remaining))
        remaining = replace(scored, batch=replace(scored.batch, completion_mask=seen[-1].keep_mask))
    return _merge(seen)


@whole_step
def bounds_at_every_level(scored: Scored, *, token: Bounds, completion: Bounds, batch: Bounds) -> Selection:
    """Keeps what token, completion and batch bounds all keep, each predicted for all tokens: the product of
    the masks.

    Source: the authors' program with bounds at several levels, with and without "sequential masking".
    """
    return _merge([level(scored) for level in _levels(token, completion, batch)])


def bounds_by_sign(
    scored: Scored,
    *,
    positive_policy_shift_max: NonNegativeOrInf,
    negative_policy_shift_max: NonNegativeOrInf,
    positive_objective_shift_max: NonNegativeOrInf,
    negative_objective_shift_max: NonNegativeOrInf,
) -> Selection:
    """Applies m_F and |m_H| bounds of their own to tokens with A > 0 and to all others (a control: does
    rejecting the correction of a wrong completion do the harm?)."""
    positive = scored.batch.advantages > 0
    policy, objective = scored.shifts.policy_shift, scored.shifts.objective_shift.abs()
    policy_ok = torch.where(positive, policy < positive_policy_shift_max, policy < negative_policy_shift_max)
    objective_ok = torch.where(
        positive, objective < positive_objective_shift_max, objective < negative_objective_shift_max
    )
    return _reject(scored, ~policy_ok, ~objective_ok)


def _levels(token: Bounds, completion: Bounds, batch: Bounds) -> list[Callable[[Scored], Selection]]:
    pairs = ((shift_bounds, token), (completion_bounds, completion), (batch_bounds, batch))
    return [partial(level, **bounds) for level, bounds in pairs]


def _merge(selections: Sequence[Selection]) -> Selection:
    """Rejects what any of them rejects."""
    keep = torch.stack([selection.keep_mask for selection in selections]).all(0)
    columns = {why: [s.rejected_by[why] for s in selections] for why in ("policy", "objective")}
    return Selection(keep, {why: torch.stack(masks).any(0) for why, masks in columns.items()})


def _reject(scored: Scored, by_policy: Tensor, by_objective: Tensor) -> Selection:
    mask = scored.batch.completion_mask
    return Selection(
        keep_mask=mask & ~by_policy & ~by_objective,
        rejected_by={"policy": mask & by_policy, "objective": mask & by_objective},
    )


def _at_level(scored: Scored, predict: Callable[..., Sequence[BatchShifts]]) -> Scored:
    """Returns the same with each completion's predicted shifts, m_H as the authors define it."""
    batch, like = scored.batch, scored.shifts.policy_shift
    tokens = curvature.pack_batch(scored.output, batch, batch.advantages, batch.completion_mask)
    shifts = predict(
        tokens, learning_rate=scored.learning_rate, state=scored.optimizer_model, world=scored.world
    )
    rows = slice(None) if scored.output.rows is None else scored.output.rows
    columns = like.new_zeros(2, len(like))
    columns[:, rows] = (
        like.new_tensor([[s.policy_shift, s.objective_shift_by_row] for s in shifts]).view(-1, 2).T
    )
    spread = TokenShifts(*(column[:, None].expand_as(like) for column in scored.world.sum(columns)))
    return replace(scored, shifts=spread)
