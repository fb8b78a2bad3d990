"""GMPO: geometric-mean policy optimisation (Zhao et al. 2025, arXiv 2507.20673)."""

import torch

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.algorithms.surrogates import completion_ratio
from capo_exp.core.masked import masked_mean
from capo_exp.core.types import TokenLoss, TokenLossInput


def geometric_mean_surrogate(
    inputs: TokenLossInput, *, log_ratio_low: NonNegativeOrInf, log_ratio_high: NonNegativeOrInf
) -> TokenLoss:
    """Returns -s A at each token, s the geometric mean of the completion's ratios, each of them held at
    exp(-low) where A < 0 and at exp(high) where A > 0. One without an advantage, as a
    correction by token leaves it, counts as 1. A held token has no gradient; the others have that of
    s, so that sequence_mean gives the paper's loss where a completion's tokens share one advantage.

    Source: arXiv 2507.20673, the objective, with its clip in log space.
    """
    log_ratio, advantages = inputs.log_ratio, inputs.advantages
    upper, lower = log_ratio.clamp(max=log_ratio_high), log_ratio.clamp(min=-log_ratio_low)
    held = torch.where(advantages > 0, upper, torch.where(advantages < 0, lower, 0 * log_ratio))
    mean = masked_mean(held, inputs.completion_mask, 1)
    clipped = (held != log_ratio) & (advantages != 0)
    return TokenLoss(values=-completion_ratio(mean, held) * advantages, clipped=clipped)
