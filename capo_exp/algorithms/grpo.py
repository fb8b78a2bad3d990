"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300); PPO's clip and dual clip."""

import torch
from jaxtyping import Float
from torch import Tensor

from capo_exp.algorithms.kinds import Above1, NonNegativeOrInf, Positive
from capo_exp.algorithms.surrogates import clipped_objective
from capo_exp.config.declare import compares_group
from capo_exp.core.masked import centre
from capo_exp.core.types import TokenLoss, TokenLossInput


@compares_group
def group_normalised(
    rewards: Float[Tensor, "P G"], *, eps: Positive, target_std: Positive
) -> Float[Tensor, "P G"]:
    """Returns (R - mean) / (std * target_std + eps) within each prompt's group, unbiased std.

    Equal rewards give exactly zero. Source: arXiv 2402.03300, section 4.1.2; eps as in TRL; target_std, 1 in
    GRPO, as in the CAPO authors' program, where it divides what its name says it sets.
    """
    return centre(rewards) / (rewards.std(1, keepdim=True) * target_std + eps)


@compares_group
def first_of_group(rewards: Float[Tensor, "P G"], *, eps: Positive) -> Float[Tensor, "P G"]:
    """Returns G times GRPO's advantage on the first completion of each prompt, 0 on the others: the baseline
    of a large group, the gradient of one sample. Source: the CAPO authors' "minibatch" recipe."""
    size = rewards.shape[1]
    first = torch.arange(size, device=rewards.device) == 0
    return group_normalised(rewards, eps=eps, target_std=1.0) * size * first


def clipped_surrogate(
    inputs: TokenLossInput, *, clip_eps_low: NonNegativeOrInf, clip_eps_high: NonNegativeOrInf
) -> TokenLoss:
    """Returns -min(r A, clip(r, 1 - low, 1 + high) A) per token, r = exp(log_probs - old_log_probs).

    Source: PPO, arXiv 1707.06347, eq. 7.
    """
    ratio = inputs.log_ratio.exp()
    return clipped_objective(ratio, inputs.advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)


def dual_clipped_surrogate(
    inputs: TokenLossInput,
    *,
    clip_eps_low: NonNegativeOrInf,
    clip_eps_high: NonNegativeOrInf,
    dual_clip: Above1,
) -> TokenLoss:
    """Returns the clipped surrogate whose loss is at most dual_clip * |A| for A < 0, however large the ratio.

    Source: dual-clip PPO, Ye et al. 2019, arXiv 1912.09729.
    """
    once = clipped_surrogate(inputs, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
    ceiling = -dual_clip * inputs.advantages
    over = (inputs.advantages < 0) & (once.values > ceiling)
    return TokenLoss(values=torch.where(over, ceiling, once.values), clipped=once.clipped | over)
