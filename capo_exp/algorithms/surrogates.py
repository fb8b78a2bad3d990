"""Ratios and clipped objectives that several papers share."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.core.types import Scored, TokenLoss

LogRatio = Callable[[Scored], Tensor]
"""[B, T] nats, ln of the policy over what a selection holds it against: `to_sampler` or `to_old_policy`."""


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


def spread(
    value: Float[Tensor, " B"],
    slope: Float[Tensor, " B"],
    log_probs: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Returns an equal part of a completion's value at each of its tokens, with `slope` as the gradient with
    respect to each token's own log-prob. A rejected token then has no gradient."""
    parts = value / completion_mask.sum(1).clamp(min=1)
    return parts[:, None] + slope[:, None] * (log_probs - log_probs.detach())


def sampler_else_old(sampler: Float[Tensor, "B T"], old: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Returns the sampler's log-probs [nats], and the learner's old ones where nobody sampled
    (demonstrations)."""
    return torch.where(sampler.isnan(), old, sampler)


def to_sampler(scored: Scored) -> Float[Tensor, "B T"]:
    """Returns ln(policy / sampler) [nats]: what the engine computed counts, too."""
    anchor = sampler_else_old(scored.batch.sampler_log_probs, scored.old_log_probs)
    return scored.output.log_probs - anchor


def to_old_policy(scored: Scored) -> Float[Tensor, "B T"]:
    """Returns ln(policy / policy that sampled) [nats], both by the learner: 0 at the first update."""
    return scored.output.log_probs - scored.old_log_probs
