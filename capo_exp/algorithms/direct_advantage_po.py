"""Direct advantage policy optimisation, step by step and offline (Liu et al. 2024, arXiv 2412.18279)."""

import torch
from jaxtyping import Float
from torch import Tensor

from capo_exp.algorithms.kinds import Positive
from capo_exp.algorithms.surrogates import spread
from capo_exp.config.declare import needs_reference, regresses
from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import TokenLoss, TokenLossInput


def value_gain(
    rewards: Float[Tensor, "P G"], reference_rewards: Float[Tensor, "P N"]
) -> Float[Tensor, "P G"]:
    """Returns V(state after the step) - V(state before it), both of the reference and by Monte Carlo: a step
    of rollout=pairs has the first as its reward, and its state the mean reward of what goes on from it.

    The paper trains a critic on such means; there is none here, and the means stand for it. Source: arXiv
    2412.18279, A(s, a) = V(s, a) - V(s).
    """
    return rewards - reference_rewards.mean(1, keepdim=True)


@regresses
@needs_reference
def advantage_regression(inputs: TokenLossInput, *, beta: Positive) -> TokenLoss:
    """Returns, an equal part at each token, (A / beta - ln(pi / pi_ref))^2 / 2 of a completion, which is one
    step where the pairs are of steps.

    At pi = pi_ref the gradient is -A / beta grad ln pi; it is 0 where ln(pi / pi_ref) is A / beta. Source:
    arXiv 2412.18279, its quadratic loss.
    """
    assert inputs.ref_log_probs is not None, "needs_reference has it computed"
    mask = inputs.completion_mask
    log_ratio = masked_sum(inputs.log_probs.detach() - inputs.ref_log_probs, mask, 1)
    misfit = log_ratio - masked_mean(inputs.advantages, mask, 1) / beta
    values = spread(misfit.square() / 2, misfit, inputs.log_probs, mask)
    return TokenLoss(values=values, clipped=torch.zeros_like(mask))
