"""CAPO: curvature-aware policy optimisation (arXiv 2510.00819)."""

from jaxtyping import Float
from torch import Tensor

from capo_exp.types import Batch, Selection, TokenShifts


def shift_bounds(
    shifts: TokenShifts,
    batch: Batch,
    log_probs: Float[Tensor, "B T"],
    *,
    policy_shift_max: float,
    objective_shift_min: float,
    objective_shift_max: float,
) -> Selection:
    """Keeps tokens with m_F < policy_shift_max and objective_shift_min < m_H < objective_shift_max.

    An infinite bound switches a test off. A token whose shift is NaN is rejected.
    Source: arXiv 2510.00819, section 5, practical rule; strict inequalities as in the authors' program.
    """
    del log_probs
    policy_ok = shifts.policy_shift < policy_shift_max
    objective_ok = (shifts.objective_shift > objective_shift_min) & (
        shifts.objective_shift < objective_shift_max
    )
    mask = batch.completion_mask
    return Selection(
        keep_mask=mask & policy_ok & objective_ok,
        rejected_by={"policy": mask & ~policy_ok, "objective": mask & ~objective_ok},
    )
