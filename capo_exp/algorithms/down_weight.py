"""CAPO's bounds as weights: a token beyond a bound is not rejected but counts less, as if its own update came
just up to the bound. Ours; the shifts are those of CAPO, arXiv 2510.00819, section 5."""

import torch

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.core.types import Scored, Selection


def to_bounds(
    scored: Scored, *, policy_shift_max: NonNegativeOrInf, objective_shift_max: NonNegativeOrInf
) -> Selection:
    """Keeps every token, with weight min(1, sqrt(policy_shift_max / m_F), objective_shift_max / |m_H|).

    m_F grows with the square of a token's update and m_H with the update itself, to first order. An infinite
    bound switches a test off. A token whose shift is not finite has weight 0.
    """
    policy = (policy_shift_max / scored.shifts.policy_shift).sqrt()
    objective = objective_shift_max / scored.shifts.objective_shift.abs()
    weights = torch.minimum(policy, objective).clamp(max=1.0).nan_to_num(0.0)
    return Selection(scored.batch.completion_mask, weights=weights)
