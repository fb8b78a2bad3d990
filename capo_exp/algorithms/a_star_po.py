"""A*-PO: regression to the optimal advantage (Brantley et al. 2025, arXiv 2505.20686)."""

from math import log

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import Positive
from capo_exp.algorithms.surrogates import spread
from capo_exp.config.declare import needs_reference, regresses
from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import TokenLoss, TokenLossInput


def solved_by_reference(
    rewards: Float[Tensor, "P G"], reference_rewards: Float[Tensor, "P N"]
) -> Bool[Tensor, " P"]:
    """Keeps prompts of which a completion of the reference earned something.

    Source: arXiv 2505.20686, section 5: prompts that the reference always fails are left out.
    """
    del rewards
    return (reference_rewards > 0).any(1)


def optimal_advantage(
    rewards: Float[Tensor, "P G"], reference_rewards: Float[Tensor, "P N"], *, beta: Positive
) -> Float[Tensor, "P G"]:
    """Returns R - V*, V* = beta ln mean exp(R / beta) over the reference's N completions of the prompt: the
    value of the best policy that pays beta KL(policy || reference). Its beta is the paper's beta_1.

    Source: arXiv 2505.20686, algorithm 1, first stage.
    """
    count = reference_rewards.shape[1]
    optimal = beta * ((reference_rewards / beta).logsumexp(1, keepdim=True) - log(count))
    return rewards - optimal


@regresses
@needs_reference
def optimal_regression(inputs: TokenLossInput, *, beta: Positive) -> TokenLoss:
    """Returns, an equal part at each token, (beta ln(pi / pi_ref) - A)^2 of a completion, A = R - V*; beta is
    the paper's beta_2.

    At pi = pi_ref the gradient is -2 beta A grad ln pi; it is 0 where ln(pi / pi_ref) is A / beta, as of the
    best policy. Source: arXiv 2505.20686, algorithm 1, second stage.
    """
    assert inputs.ref_log_probs is not None, "needs_reference has it computed"
    mask = inputs.completion_mask
    log_ratio = masked_sum(inputs.log_probs.detach() - inputs.ref_log_probs, mask, 1)
    misfit = beta * log_ratio - masked_mean(inputs.advantages, mask, 1)
    values = spread(misfit.square(), 2 * beta * misfit, inputs.log_probs, mask)
    return TokenLoss(values=values, clipped=torch.zeros_like(mask))
