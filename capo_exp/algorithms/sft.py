"""Supervised fine-tuning, on demonstrations (rollout=demonstrations) or on the model's own correct
completions (any sampling engine): with A = R the wrong ones weigh nothing."""

import torch

from capo_exp.core.types import TokenLoss, TokenLossInput


def negative_log_likelihood(inputs: TokenLossInput) -> TokenLoss:
    """Returns -A ln pi per token: cross-entropy where A = 1, the plain policy gradient of DASH otherwise."""
    return TokenLoss(-inputs.advantages * inputs.log_probs, clipped=torch.zeros_like(inputs.completion_mask))
