"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.surrogates import clipped_objective, completion_ratio
from capo_exp.core.masked import centre, masked_sum
from capo_exp.core.types import TokenLoss


def kl_in_reward(
    rewards: Float[Tensor, "P G"],
    lengths: Float[Tensor, "P G"],
    kl: Float[Tensor, "P G"],
    *,
    kl_coefficient: float,
) -> Float[Tensor, "P G"]:
    """R - coefficient * ln(policy / reference) of the whole completion.

    Source: arXiv 2402.14740, KL-shaped reward.
    """
    del lengths
    return rewards - kl_coefficient * kl


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """R_i - mean of the group's other rewards = G / (G - 1) (R_i - mean). [P, G] -> [P, G].

    Source: arXiv 2402.14740, the RLOO estimator.
    """
    size = rewards.shape[1]
    return centre(rewards) * (size / (size - 1))


def completion_surrogate(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> TokenLoss:
    """The clipped surrogate with the ratio of the whole completion; its tokens' sum has the gradient of
    -min(s A, clip(s) A). Source: the sequence-level form of TRL's RLOOTrainer."""
    log_ratio = masked_sum(log_probs - old_log_probs, completion_mask, 1)
    ratio = completion_ratio(log_ratio, log_probs)
    return clipped_objective(ratio, advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
