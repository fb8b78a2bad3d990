"""CISPO, a method of a package of its own: one function, which conf/algo/my_cispo.yaml names."""

from typing import Annotated

from capo_exp import TokenLoss, TokenLossInput
from capo_exp.config.ranges import NON_NEGATIVE_OR_INF


def clipped_weight(
    inputs: TokenLossInput,
    *,
    clip_eps_low: Annotated[float, NON_NEGATIVE_OR_INF],
    clip_eps_high: Annotated[float, NON_NEGATIVE_OR_INF],
) -> TokenLoss:
    """Returns -w A log_probs per token, w = clip(r, 1 - low, 1 + high) without a gradient: a token that is
    clipped still learns, with a bounded weight.

    Source: CISPO, MiniMax-M1 (arXiv 2506.13585), eq. 4 and 5.
    """
    ratio = inputs.log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    return TokenLoss(values=-weight * inputs.advantages * inputs.log_probs, clipped=weight != ratio)
