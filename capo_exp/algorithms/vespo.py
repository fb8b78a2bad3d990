"""VESPO: variational sequence-level soft policy optimisation (arXiv 2602.10693)."""

import torch

from capo_exp.algorithms.kinds import NonNegative
from capo_exp.core.masked import masked_sum
from capo_exp.core.types import TokenLoss, TokenLossInput


def gamma_weighted(
    inputs: TokenLossInput,
    *,
    positive_power: NonNegative,
    positive_rate: NonNegative,
    negative_power: NonNegative,
    negative_rate: NonNegative,
) -> TokenLoss:
    """Returns -sg(phi(W)) A ln pi per token, phi(W) = W^k exp(lambda (1 - W)) of the whole completion's ratio
    W, with power k and rate lambda by the sign of A: 1 at W = 1, and 0 far from it on both sides.
    ln W is held in [-20, 20].

    Power and rate 0 are the policy gradient without a ratio. Source: arXiv 2602.10693; TRL's vespo.
    """
    advantages = inputs.advantages
    log_ratio = masked_sum(inputs.log_ratio.detach(), inputs.completion_mask, 1)[:, None].clamp(-20, 20)
    power = torch.where(advantages >= 0, positive_power, negative_power)
    rate = torch.where(advantages >= 0, positive_rate, negative_rate)
    phi = (power * log_ratio - rate * torch.expm1(log_ratio)).exp()
    values = -phi * advantages * inputs.log_probs
    return TokenLoss(values=values, clipped=torch.zeros_like(inputs.completion_mask))
