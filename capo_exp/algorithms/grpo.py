"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300)."""

import torch
from jaxtyping import Float
from torch import Tensor

from capo_exp.masked import centre
from capo_exp.types import TokenLoss


def group_normalised(rewards: Float[Tensor, "P G"], *, eps: float) -> Float[Tensor, "P G"]:
    """(R - mean) / (std + eps) within each prompt's group, unbiased std. [P, G] -> [P, G].

    Equal rewards give exactly zero. Source: arXiv 2402.03300, section 4.1.2; eps as in TRL.
    """
    return centre(rewards) / (rewards.std(1, keepdim=True) + eps)


def clipped_surrogate(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> TokenLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A) per token, r = exp(log_probs - old_log_probs).

    Source: PPO, arXiv 1707.06347, eq. 7.
    """
    ratio = (log_probs - old_log_probs).exp()
    advantage = advantages[:, None]
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantage
    return TokenLoss(values=-torch.minimum(unclipped, clipped), clipped=clipped < unclipped)
