"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegative, NonNegativeOrInf
from capo_exp.algorithms.surrogates import clipped_objective, completion_ratio
from capo_exp.config.declare import compares_group, needs_kl
from capo_exp.core.masked import centre, masked_sum
from capo_exp.core.types import TokenLoss, TokenLossInput

LARGEST = 20.0
"""Nats at which the log of a completion's ratio is held."""


@needs_kl(unless_zero="kl_coefficient")
def kl_in_reward(
    rewards: Float[Tensor, "P G"],
    lengths: Float[Tensor, "P G"],
    kl: Float[Tensor, "P G"],
    *,
    kl_coefficient: NonNegative,
) -> Float[Tensor, "P G"]:
    """Returns R - coefficient * ln(policy / reference) of the whole completion.

    Source: arXiv 2402.14740, KL-shaped reward.
    """
    del lengths
    return rewards - kl_coefficient * kl


@compares_group
def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Returns R_i - mean of the group's other rewards = G / (G - 1) (R_i - mean). [P, G] -> [P, G].

    Source: arXiv 2402.14740, the RLOO estimator.
    """
    size = rewards.shape[1]
    return centre(rewards) * (size / (size - 1))


def completion_surrogate(
    inputs: TokenLossInput, *, clip_eps_low: NonNegativeOrInf, clip_eps_high: NonNegativeOrInf
) -> TokenLoss:
    """Returns the clipped surrogate with the ratio of the whole completion, an equal part at each of its
    tokens: their sum has the value and the gradient of -min(s A, clip(s) A). ln s is held at LARGEST, for the
    product of many ratios can be more than a float32. Source: the sequence-level form of TRL's RLOOTrainer.
    """
    log_ratio = masked_sum(inputs.log_ratio, inputs.completion_mask, 1).clamp(max=LARGEST)
    ratio = completion_ratio(log_ratio, inputs.log_probs)
    loss = clipped_objective(ratio, inputs.advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
    whole = loss.values.detach()
    parts = whole / inputs.completion_mask.sum(1, keepdim=True).clamp(min=1)
    return replace(loss, values=loss.values - whole + parts)  # in value a part, in gradient the whole
