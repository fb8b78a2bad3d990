"""CAPO: curvature-aware policy optimisation (arXiv 2510.00819), its bounds at every level."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegativeOrInf, NotNan
from capo_exp.config.declare import ordered, whole_step
from capo_exp.core.types import BatchShifts, Scored, Selection, TokenShifts
from capo_exp.curvature import model as curvature


@ordered("objective_shift_min", "objective_shift_max")
def shift_bounds(
    scored: Scored,
    *,
    policy_shift_max: NonNegativeOrInf,
    objective_shift_min: NotNan,
    objective_shift_max: NotNan,
) -> Selection:
    """Keeps tokens with m_F < policy_shift_max and objective_shift_min < m_H < objective_shift_max.

    An infinite bound switches a test off. A token whose shift is NaN is rejected.
    Source: arXiv 2510.00819, section 5, practical rule; strict inequalities as in the authors' program.
    """
    policy_ok = scored.shifts.policy_shift < policy_shift_max
    objective_ok = (scored.shifts.objective_shift > objective_shift_min) & (
        scored.shifts.objective_shift < objective_shift_max
    )
    return _reject(scored, ~policy_ok, ~objective_ok)


@ordered("objective_shift_min", "objective_shift_max")
def completion_bounds(
    scored: Scored,
    *,
    policy_shift_max: NonNegativeOrInf,
    objective_shift_min: NotNan,
    objective_shift_max: NotNan,
) -> Selection:
    """Applies the same test to the shifts of each completion's mean update; rejects whole completions.

    Source: the authors' "sentence" level.
    """
    tokens, count = _pack(scored), len(scored.batch.group_ids)
    shifts = curvature.completion_shifts(
        tokens, count, learning_rate=scored.learning_rate, state=scored.optimizer_model
    )
    return shift_bounds(
        replace(scored, shifts=_spread(shifts, scored)),
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

    Source: the authors' "global" level.
    """
    tokens = _pack(scored)
    gradients = curvature.mean_row_gradients(tokens)
    shifts = curvature.batch_shifts(
        tokens, gradients, learning_rate=scored.learning_rate, state=scored.optimizer_model
    )
    return shift_bounds(
        replace(scored, shifts=_spread([shifts] * len(scored.batch.group_ids), scored)),
        policy_shift_max=policy_shift_max,
        objective_shift_min=objective_shift_min,
        objective_shift_max=objective_shift_max,
    )


class Bounds(TypedDict):
    """The bounds of one level."""

    policy_shift_max: NonNegativeOrInf
    objective_shift_min: NotNan
    objective_shift_max: NotNan


@whole_step
def bounds_in_sequence(scored: Scored, *, token: Bounds, completion: Bounds, batch: Bounds) -> Selection:
    """Applies token, completion and batch bounds one after another, each to the tokens that the ones before
    kept. Source: the authors' option "sequential masking"."""
    mask = scored.batch.completion_mask
    keep, rejected = mask, {"policy": torch.zeros_like(mask), "objective": torch.zeros_like(mask)}
    for level, bounds in ((shift_bounds, token), (completion_bounds, completion), (batch_bounds, batch)):
        remaining = replace(scored, batch=replace(scored.batch, completion_mask=keep))
        selection = level(remaining, **bounds)
        keep = selection.keep_mask
        rejected = {why: rejected[why] | selection.rejected_by[why] for why in rejected}
    return Selection(keep, rejected)


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


def _reject(scored: Scored, by_policy: Tensor, by_objective: Tensor) -> Selection:
    mask = scored.batch.completion_mask
    return Selection(
        keep_mask=mask & ~by_policy & ~by_objective,
        rejected_by={"policy": mask & by_policy, "objective": mask & by_objective},
    )


def _pack(scored: Scored) -> curvature.Tokens:
    batch = scored.batch
    return curvature.pack_batch(scored.output, batch, batch.advantages, batch.completion_mask)


def _spread(shifts: Sequence[BatchShifts], scored: Scored) -> TokenShifts:
    """Puts a completion's shifts at each of its tokens."""
    like = scored.shifts.policy_shift
    columns = [[getattr(s, name) for s in shifts] for name in ("policy_shift", "objective_shift")]
    policy, objective = (like.new_tensor(column)[:, None].expand_as(like) for column in columns)
    return TokenShifts(policy, objective)
