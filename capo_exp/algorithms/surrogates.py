"""Ratios and clipped objectives that several papers share."""

import torch
from jaxtyping import Float
from torch import Tensor

from capo_exp.core.types import TokenLoss


def clipped_objective(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> TokenLoss:
    """Returns -min(r A, clip(r, 1 - low, 1 + high) A) per token; `clipped` where the second is the smaller.

    Source: PPO, arXiv 1707.06347, eq. 7.
    """
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantages
    return TokenLoss(values=-torch.minimum(unclipped, clipped), clipped=clipped < unclipped)


def completion_ratio(log_ratio: Float[Tensor, " B"], log_probs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Returns exp(log_ratio) of a completion at each of its tokens, in a form whose gradient reaches each
    token through that token's own log-prob: sg(s) * pi / sg(pi). A rejected token then has no gradient.

    Source: GSPO-token, arXiv 2507.18071, eq. 14.
    """
    return (log_ratio.detach()[:, None] + log_probs - log_probs.detach()).exp()
