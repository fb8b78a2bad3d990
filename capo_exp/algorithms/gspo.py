"""GSPO: group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071)."""

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.algorithms.surrogates import clipped_objective, completion_ratio
from capo_exp.core.masked import masked_mean
from capo_exp.core.types import TokenLoss, TokenLossInput


def sequence_surrogate(
    inputs: TokenLossInput, *, clip_eps_low: NonNegativeOrInf, clip_eps_high: NonNegativeOrInf
) -> TokenLoss:
    """Returns the clipped surrogate with the completion's geometric mean ratio, token by token (GSPO-token,
    equal to GSPO under sequence_mean where a completion's tokens share one advantage).

    Source: arXiv 2507.18071, eq. 7 and 13 to 17.
    """
    log_ratio = masked_mean(inputs.log_ratio, inputs.completion_mask, 1)
    ratio = completion_ratio(log_ratio, inputs.log_probs)
    return clipped_objective(ratio, inputs.advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
