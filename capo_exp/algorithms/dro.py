"""DRO: direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107), on the policy's own samples."""

import torch

from capo_exp.algorithms.kinds import NonNegative
from capo_exp.core.types import TokenLoss, TokenLossInput


def quadratic_surrogate(inputs: TokenLossInput, *, beta: NonNegative) -> TokenLoss:
    """Returns -(A ln pi - beta / 2 (ln r)^2) per token: a quadratic pull to the policy that sampled, without
    ratio and clip; its gradient is -(A - beta ln r) grad ln pi.

    Source: arXiv 2405.19107, with A for R - V, the policy that sampled as the reference and the square
    of each token's ln r, as public programs have it; the paper squares the sum over a completion.
    """
    values = 0.5 * beta * inputs.log_ratio.square() - inputs.advantages * inputs.log_probs
    return TokenLoss(values=values, clipped=torch.zeros_like(inputs.completion_mask))
