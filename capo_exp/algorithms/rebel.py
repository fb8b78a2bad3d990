"""REBEL: regression to relative rewards (Gao et al. 2024, arXiv 2404.16767)."""

from functools import partial

import torch
from torch import Tensor

from capo_exp.algorithms.kinds import Positive
from capo_exp.algorithms.surrogates import spread
from capo_exp.config.declare import compares_group, regresses, whole_step
from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import Scored, TokenLoss, TokenLossInput


@compares_group
@regresses
@whole_step
def relative_regression(inputs: TokenLossInput, *, eta: Positive) -> TokenLoss:
    """Returns, an equal part at each token, 2 G / (G - 1) (d - mean d)^2 of a completion, where d is
    ln(pi / pi_old) / eta - A and the mean is over the G completions of its prompt in the step.

    Their average is that of ((ln pi/pi_old(y) - ln pi/pi_old(y')) / eta - (A - A'))^2 over all pairs of a
    prompt, and so is the gradient: that of the means cancels. At pi = pi_old it is 4 / eta times RLOO's.
    Source: arXiv 2404.16767, algorithm 1, with every pair of the group in place of one.
    """
    misfit = inputs.of_step(partial(_misfit, eta=eta))
    weight = inputs.of_step(_weight)
    slope = 2 / eta * weight * misfit
    values = spread(weight * misfit.square(), slope, inputs.log_probs, inputs.completion_mask)
    return TokenLoss(values=values, clipped=torch.zeros_like(inputs.completion_mask))


def _misfit(step: Scored, eta: float) -> Tensor:
    """Returns d - mean d [B]."""
    mask = step.batch.completion_mask
    log_ratio = masked_sum(step.output.log_probs - step.old_log_probs, mask, 1)
    d = log_ratio / eta - masked_mean(step.batch.advantages, mask, 1)
    same = _same_prompt(step)
    return d - same.to(d.dtype) @ d / same.sum(1)


def _weight(step: Scored) -> Tensor:
    """Returns 2 G / (G - 1) [B], 2 for a completion alone, which has no pair and no misfit."""
    size = _same_prompt(step).sum(1)
    return 2 * size / (size - 1).clamp(min=1)


def _same_prompt(step: Scored) -> Tensor:
    groups = step.batch.group_ids
    return groups[:, None] == groups
