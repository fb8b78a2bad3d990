"""CPGD: clipped policy gradient with policy drift (Liu et al. 2025, arXiv 2505.12504)."""

from collections.abc import Callable
from dataclasses import replace
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import AtLeast1, NonNegative, NonNegativeOrInf, Share
from capo_exp.algorithms.surrogates import clipped_objective
from capo_exp.config.declare import compares_group
from capo_exp.core.masked import centre
from capo_exp.core.types import TokenLoss, TokenLossInput

TokenValues = Float[Tensor, "B T"]


@compares_group
def clip_filter_weighted(rewards: Float[Tensor, "P G"], *, max_weight: AtLeast1) -> Float[Tensor, "P G"]:
    """Returns w (R - mean), w = min(max_weight, prompts / prompts whose rewards differ): prompts with a
    signal make up for those without. [P, G] -> [P, G].

    Source: arXiv 2505.12504, the clip-filter-like weight. Equal weights are dr_grpo.group_centred, weights
    1 / std grpo.group_normalised, unprocessed rewards reinforce.raw_reward.
    """
    mixed = (rewards != rewards[:, :1]).any(1).sum().clamp(min=1)
    weight = (len(rewards) / mixed).clamp(max=max_weight)
    return weight * centre(rewards)


def policy_drift_surrogate(
    inputs: TokenLossInput,
    *,
    clip_eps_low: NonNegativeOrInf,
    clip_eps_high: NonNegativeOrInf,
    tightness: Share,
    drift_coefficient: NonNegative,
    drift_max: NonNegativeOrInf,
) -> TokenLoss:
    """Returns -min(A ln r, A clip(ln r)) + drift_coefficient * min(sg(r) - 1, drift_max) * ln pi per token.

    The first term's gradient is A grad ln pi, without a ratio, and 0 where the clip acts; the second's is
    that of the k3 estimator of KL(old || policy), cut off above. Bounds of token i of n are
    eps * (tightness + (1 - tightness) i / n): 1 = constant, less = tight to loose. eps 1 below and infinite
    above switch the clip off, coefficient 0 the drift: the paper's ablations PG, CPG, PGD.
    Source: arXiv 2505.12504, the practical loss and section on clip ranges.
    """
    log_ratio, advantages = inputs.log_ratio, inputs.advantages
    widening = _widening(inputs.completion_mask, tightness)
    low = torch.log1p(-(clip_eps_low * widening).clamp(max=1.0))
    high = torch.log1p(clip_eps_high * widening) if clip_eps_high < inf else torch.full_like(widening, inf)
    unclipped = advantages * log_ratio
    clipped = advantages * torch.minimum(torch.maximum(log_ratio, low), high)
    drift = _drift(inputs, drift_max)
    values = -torch.minimum(unclipped, clipped) + drift_coefficient * drift
    return TokenLoss(values=values, clipped=clipped < unclipped)


def reweighted(
    inputs: TokenLossInput, *, token_loss: Callable[..., TokenLoss], weight_eps: NonNegativeOrInf
) -> TokenLoss:
    """Returns a token loss with A * clip(sg(r), 1 - weight_eps, 1 + weight_eps) in place of A, for inner
    epochs after the first; at ratio 1, so in the first, it is the same.

    Source: arXiv 2505.12504. The paper's r is that of the epoch's first weights; here that of each update's.
    """
    weight = inputs.log_ratio.detach().exp().clamp(1 - weight_eps, 1 + weight_eps)
    return token_loss(replace(inputs, advantages=inputs.advantages * weight))


def clipped_surrogate_with_drift(
    inputs: TokenLossInput,
    *,
    clip_eps_low: NonNegativeOrInf,
    clip_eps_high: NonNegativeOrInf,
    drift_coefficient: NonNegative,
    drift_max: NonNegativeOrInf,
) -> TokenLoss:
    """Returns PPO's clipped surrogate with CPGD's drift: the paper's stable "GRPO with drift"."""
    ratio = inputs.log_ratio.exp()
    loss = clipped_objective(ratio, inputs.advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
    drift = _drift(inputs, drift_max)
    return replace(loss, values=loss.values + drift_coefficient * drift)


def _drift(inputs: TokenLossInput, drift_max: float) -> TokenValues:
    """Returns min(sg(r) - 1, drift_max) * ln pi: its gradient is that of k3 of KL(old || policy), cut off
    above."""
    excess = inputs.log_ratio.detach().exp() - 1
    return excess.clamp(max=drift_max) * inputs.log_probs


def _widening(completion_mask: Bool[Tensor, "B T"], tightness: float) -> TokenValues:
    """Returns tightness + (1 - tightness) i / n for the i-th of n tokens, counted from 1."""
    position = completion_mask.cumsum(1) / completion_mask.sum(1, keepdim=True).clamp(min=1)
    return tightness + (1 - tightness) * position
