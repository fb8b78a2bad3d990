"""CAPO: curvature-aware policy optimisation (arXiv 2510.00819), its bounds at every level."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from capo_exp.algorithms.neutral import require_whole_step
from capo_exp.core.types import BatchShifts, Scored, Selection, TokenShifts
from capo_exp.curvature import model as curvature


def shift_bounds(
    scored: Scored, *, policy_shift_max: float, objective_shift_min: float, objective_shift_max: float
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


def completion_bounds(
    scored: Scored, *, policy_shift_max: float, objective_shift_min: float, objective_shift_max: float
) -> Selection:
    """The same test on the shifts of each completion's mean update; rejects whole completions.

    Source: the authors' "sentence" level.
    """
    shifts = curvature.completion_shifts(*_tokens(scored), **_step(scored))
    return shift_bounds(
        replace(scored, shifts=_spread(shifts, scored)),
        policy_shift_max=policy_shift_max,
        objective_shift_min=objective_shift_min,
        objective_shift_max=objective_shift_max,
    )


def batch_bounds(
    scored: Scored, *, policy_shift_max: float, objective_shift_min: float, objective_shift_max: float
) -> Selection:
    """The same test on the shifts of the whole step's mean update; keeps all or nothing.

    Raises:
        ConfigError: if it sees one micro-batch of several (algo.scoring_pass must be true).
    Source: the authors' "global" level.
    """
    require_whole_step(scored, "batch_bounds")
    gradients = curvature.mean_row_gradients(*_tokens(scored))
    shifts = curvature.batch_shifts(*_tokens(scored), **_step(scored), gradients=gradients)
    return shift_bounds(
        replace(scored, shifts=_spread([shifts] * len(scored.batch.group_ids), scored)),
        policy_shift_max=policy_shift_max,
        objective_shift_min=objective_shift_min,
        objective_shift_max=objective_shift_max,
    )


def bounds_in_sequence(
    scored: Scored,
    *,
    token: dict[str, float],
    completion: dict[str, float],
    batch: dict[str, float],
) -> Selection:
    """Token, completion and batch bounds one after another, each on the tokens that the ones before kept.

    Each level is {policy_shift_max, objective_shift_min, objective_shift_max}. Source: the authors' option
    "sequential masking".
    """
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
    positive_policy_shift_max: float,
    negative_policy_shift_max: float,
    positive_objective_shift_max: float,
    negative_objective_shift_max: float,
) -> Selection:
    """m_F and |m_H| bounds of their own for tokens with A > 0 and for all others (a control: does rejecting
    the correction of a wrong completion do the harm?)."""
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


def _tokens(scored: Scored) -> tuple[Tensor, ...]:
    output, batch = scored.output, scored.batch
    fields = (output.hidden, output.topk_probs, output.topk_ids)
    return (*fields, batch.token_ids, batch.advantages, batch.completion_mask)


def _step(scored: Scored) -> dict[str, object]:
    return {"learning_rate": scored.learning_rate, "state": scored.optimizer_model}


def _spread(shifts: Sequence[BatchShifts], scored: Scored) -> TokenShifts:
    """A completion's shifts at each of its tokens."""
    like = scored.shifts.policy_shift
    columns = [[getattr(s, name) for s in shifts] for name in ("policy_shift", "objective_shift")]
    policy, objective = (like.new_tensor(column)[:, None].expand_as(like) for column in columns)
    return TokenShifts(policy, objective)
