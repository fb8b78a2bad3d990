"""QUATRO: query-adaptive trust-region policy optimisation (Lee et al. 2026, arXiv 2602.04620)."""

from functools import partial

import torch
from torch import Tensor

from capo_exp.algorithms.kinds import PositiveOrInf
from capo_exp.algorithms.surrogates import spread
from capo_exp.config.declare import compares_group, regresses, whole_step
from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import Scored, TokenLoss, TokenLossInput

HALVINGS = 60
"""Of the interval of ln(multiplier), which is 28 wide: to 1e-16."""

LONGEST = 20.0
"""Nats to which the log-ratio of a completion is held, beyond which its exponential says nothing more."""


@compares_group
@regresses
@whole_step
def lagrangian(inputs: TokenLossInput, *, divergence_max: PositiveOrInf) -> TokenLoss:
    """Returns, an equal part at each token, -W A + lambda (W ln W - W + 1) of a completion, W its whole
    ratio: the Lagrangian of the largest E[A] with KL(policy || old policy) <= divergence_max [nats] for
    each prompt. Its gradient is -W (A - lambda ln W) grad ln pi: 0 where ln W is A / lambda.

    A prompt's multiplier lambda solves the dual, min over lambda of lambda (divergence_max + ln mean
    exp(A / lambda)), over its completions in the step; without a bound it is 0. Source: arXiv 2602.04620, the
    problem that it states, with a multiplier for each prompt and a log-ratio; the estimates are ours.
    """
    mask = inputs.completion_mask
    log_ratio = masked_sum(inputs.log_ratio.detach(), mask, 1).clamp(-LONGEST, LONGEST)
    advantage = masked_mean(inputs.advantages, mask, 1)
    ratio, multiplier = log_ratio.exp(), inputs.of_step(partial(_multipliers, bound=divergence_max))
    divergence = ratio * log_ratio - torch.expm1(log_ratio)
    slope = -ratio * (advantage - multiplier * log_ratio)
    values = spread(multiplier * divergence - ratio * advantage, slope, inputs.log_probs, mask)
    return TokenLoss(values=values, clipped=torch.zeros_like(mask))


def _multipliers(step: Scored, bound: float) -> Tensor:
    """Returns lambda [B] of each completion's prompt, at which exp(A / lambda) is `bound` nats from uniform
    over the prompt's completions; 0 where they have one advantage, so that nothing can move."""
    groups, mask = step.batch.group_ids, step.batch.completion_mask
    advantage = masked_mean(step.batch.advantages, mask, 1)
    same = groups[:, None] == groups
    centred = (advantage - (same * advantage).sum(1, keepdim=True) / same.sum(1, keepdim=True)) * same
    low, high = torch.full_like(advantage, 1e-6), torch.full_like(advantage, 1e6)
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        tilted = (centred / middle[:, None]).masked_fill(~same, -torch.inf).log_softmax(1)
        beyond = masked_sum(tilted.exp() * tilted, same, 1) + same.sum(1).log() > bound
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return torch.where(centred.abs().amax(1) > 0, high, 0.0) if bound < torch.inf else torch.zeros_like(high)
