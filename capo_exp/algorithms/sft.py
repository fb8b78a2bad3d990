"""Supervised fine-tuning, on demonstrations (rollout=demonstrations) or on the model's own correct
completions (any sampling engine): with A = R the wrong ones weigh nothing."""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.core.types import TokenLoss


def negative_log_likelihood(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"],
) -> TokenLoss:
    """-A ln pi per token: cross-entropy where A = 1, the plain policy gradient of DASH otherwise."""
    del old_log_probs, completion_mask
    return TokenLoss(values=-advantages * log_probs, clipped=log_probs.new_zeros(log_probs.shape).bool())
