"""DPPO: divergence proximal policy optimisation (Qi et al. 2026, arXiv 2602.04879), its binary divergences.

As PPO's clip it acts from the second update on a batch. The distance is to the learner's policy before the
first; what the sampler computes otherwise is for rollout/correction.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.core.types import TokenLoss

TokenValues = Float[Tensor, "B T"]


def tv_masked(
    log_probs: TokenValues,
    old_log_probs: TokenValues,
    advantages: TokenValues,
    completion_mask: Bool[Tensor, "B T"],
    *,
    delta_low: float,
    delta_high: float,
    ratio_cap: float,
) -> TokenLoss:
    """-min(r, ratio_cap) A, without a gradient where a token's probability p has left its old one, q, in the
    direction of A by |p - q| > delta_high (A > 0) or delta_low (A < 0).

    Source: arXiv 2602.04879, binary total variation.
    """
    del completion_mask
    return _masked(log_probs, old_log_probs, advantages, _tv, (delta_low, delta_high), ratio_cap)


def kl_masked(
    log_probs: TokenValues,
    old_log_probs: TokenValues,
    advantages: TokenValues,
    completion_mask: Bool[Tensor, "B T"],
    *,
    delta_low: float,
    delta_high: float,
    ratio_cap: float,
) -> TokenLoss:
    """The same with the divergence q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)), in nats.

    Source: arXiv 2602.04879, binary KL.
    """
    del completion_mask
    return _masked(log_probs, old_log_probs, advantages, _kl, (delta_low, delta_high), ratio_cap)


def _masked(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    deltas: tuple[float, float],
    ratio_cap: float,
) -> TokenLoss:
    now = log_probs.detach()
    ratio = (now - old_log_probs).exp()
    delta = torch.where(advantages > 0, deltas[1], deltas[0])
    along = (ratio - 1) * advantages > 0
    left = along & (divergence(now.exp(), old_log_probs.exp()) > delta)
    score = torch.where(left, 0.0, log_probs - now)  # 0 in value; its gradient is that of ln p
    return TokenLoss(values=-ratio.clamp(max=ratio_cap) * advantages * (1 + score), clipped=left)


def _tv(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).abs()


def _kl(new: Tensor, old: Tensor) -> Tensor:
    """Not a number, hence above no bound, where both are 1."""
    return torch.xlogy(old, old / new) + torch.xlogy(1 - old, (1 - old) / (1 - new))
