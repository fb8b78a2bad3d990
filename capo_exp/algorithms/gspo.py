"""GSPO: group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071)."""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.surrogates import clipped_objective, completion_ratio
from capo_exp.core.masked import masked_mean
from capo_exp.core.types import TokenLoss


def sequence_surrogate(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> TokenLoss:
    """The clipped surrogate with the completion's geometric mean ratio, token by token (GSPO-token, equal to
    GSPO under sequence_mean where a completion's tokens share one advantage).

    Source: arXiv 2507.18071, eq. 7 and 13 to 17.
    """
    log_ratio = masked_mean(log_probs - old_log_probs, completion_mask, 1)
    ratio = completion_ratio(log_ratio, log_probs)
    return clipped_objective(ratio, advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
