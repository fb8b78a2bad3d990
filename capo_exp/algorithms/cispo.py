"""CISPO: clipped importance-sampling weights (MiniMax-M1, arXiv 2506.13585)."""

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.core.types import TokenLoss, TokenLossInput


def clipped_weight(
    inputs: TokenLossInput, *, clip_eps_low: NonNegativeOrInf, clip_eps_high: NonNegativeOrInf
) -> TokenLoss:
    """Returns -sg(clip(r, 1 - low, 1 + high)) A ln pi per token: the clip bounds a token's weight and takes
    nobody's gradient. `clipped` is where the weight is not the ratio.

    Source: arXiv 2506.13585, eq. 4 and 5; TRL and ScaleRL have the upper bound alone, low = 1 here.
    """
    ratio = inputs.log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    return TokenLoss(values=-weight * inputs.advantages * inputs.log_probs, clipped=weight != ratio)
