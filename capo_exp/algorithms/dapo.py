"""DAPO (Yu et al. 2025, arXiv 2503.14476): dynamic sampling and care for completions that are too long. Its
clip-higher is grpo.clipped_surrogate with two bounds, its token mean aggregation.token_mean."""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import Count
from capo_exp.config.declare import ordered
from capo_exp.core.types import Scored, Selection


def mixed_rewards(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Keeps groups whose rewards are not all equal. Source: arXiv 2503.14476, eq. 11 (dynamic sampling)."""
    return (rewards != rewards[:, :1]).any(1)


@ordered("cache", "max_length")
def overlong_penalty(
    rewards: Float[Tensor, "P G"],
    lengths: Float[Tensor, "P G"],
    kl: Float[Tensor, "P G"],
    *,
    max_length: Count,
    cache: Count,
) -> Float[Tensor, "P G"]:
    """Adds 0 up to max_length - cache tokens, then falls linearly to -1 at max_length and stays there.

    Source: arXiv 2503.14476, eq. 13 (soft overlong punishment).
    """
    del kl
    return rewards + ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def drop_truncated(scored: Scored) -> Selection:
    """Rejects every token of a completion that was cut at the length limit. Source: arXiv 2503.14476,
    section 3.4 (overlong filtering)."""
    mask = scored.batch.completion_mask
    cut = mask & scored.batch.truncated[:, None]
    return Selection(keep_mask=mask & ~cut, rejected_by={"truncated": cut})
