"""Lite PPO: two tricks of many (Liu et al. 2025, "Tricks or traps?", arXiv 2508.08221)."""

from jaxtyping import Float
from torch import Tensor

from capo_exp.algorithms.kinds import Positive
from capo_exp.config.declare import compares_group
from capo_exp.core.masked import centre


@compares_group
def batch_normalised(rewards: Float[Tensor, "P G"], *, eps: Positive) -> Float[Tensor, "P G"]:
    """Returns (R - mean of the prompt's group) / (std of the step's rewards + eps), unbiased std: one scale
    for all prompts, so that a nearly equal group is not blown up.

    Source: arXiv 2508.08221, group-level mean and batch-level standard deviation; TRL's scale_rewards=batch.
    """
    return centre(rewards) / (rewards.std() + eps)
