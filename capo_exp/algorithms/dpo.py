"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), and SimPO's loss."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from capo_exp.algorithms.kinds import NonNegative, Positive
from capo_exp.algorithms.surrogates import spread
from capo_exp.config.declare import compares_group, needs_reference, regresses, whole_step
from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import Scored, TokenLoss, TokenLossInput

Score = Callable[[Scored], Tensor]
"""[B] what decides which completion of a pair is ahead: a function of their log-probs."""


@compares_group
@regresses
@whole_step
@needs_reference
def preference(inputs: TokenLossInput, *, beta: Positive) -> TokenLoss:
    """Returns, an equal part at each token, a completion's half of -ln sigmoid(beta (D_w - D_l)) of each pair
    that it is in, times G / pairs of its prompt; D is ln(pi / pi_ref) of a completion, w has the larger
    advantage. The mean over completions is the mean over prompts of the mean over pairs.

    The gradient of D_w is -beta sigmoid(beta (D_l - D_w)), of D_l the same with the other sign: beta / 2 at
    pi = pi_ref. A prompt whose advantages are equal has no pair, and 0. Source: arXiv 2305.18290, eq. 7, with
    every pair of the group in place of one.
    """
    return _logistic(inputs, lambda step: beta * _log_ratio(step), margin=0.0, slope=beta)


@compares_group
@regresses
@whole_step
def simpo(inputs: TokenLossInput, *, beta: Positive, gamma: NonNegative) -> TokenLoss:
    """Returns what `preference` does, of -ln sigmoid(beta (M_w - M_l) - gamma); M is the mean log-prob of
    a completion's tokens, so there is no reference. Source: SimPO, arXiv 2405.14734, eq. 6."""
    slope = beta / inputs.completion_mask.sum(1).clamp(min=1)
    return _logistic(inputs, lambda step: beta * _mean_log_prob(step), margin=gamma, slope=slope)


def _log_ratio(step: Scored) -> Tensor:
    assert step.ref_log_probs is not None, "needs_reference has it computed"
    return masked_sum(step.output.log_probs - step.ref_log_probs, step.batch.completion_mask, 1)


def _mean_log_prob(step: Scored) -> Tensor:
    return masked_mean(step.output.log_probs, step.batch.completion_mask, 1)


def _logistic(inputs: TokenLossInput, score: Score, margin: float, slope: float | Tensor) -> TokenLoss:
    """Returns a completion's halves of its pairs' losses; `slope`, [B] or one for all, is the derivative of
    its score by the log-prob of each of its tokens."""
    value, pull = (inputs.of_step(partial(part, score=score, margin=margin)) for part in (_losses, _pulls))
    values = spread(value, slope * pull, inputs.log_probs, inputs.completion_mask)
    return TokenLoss(values=values, clipped=torch.zeros_like(inputs.completion_mask))


def _losses(step: Scored, score: Score, margin: float) -> Tensor:
    lead, weight = _pairs(step, score)
    loss = weight * softplus(margin - lead)
    return (loss.sum(1) + loss.sum(0)) / 2


def _pulls(step: Scored, score: Score, margin: float) -> Tensor:
    lead, weight = _pairs(step, score)
    pull = weight * (margin - lead).sigmoid()
    return pull.sum(0) - pull.sum(1)


def _pairs(step: Scored, score: Score) -> tuple[Tensor, Tensor]:
    """Returns score_i - score_j and the weight of the pair [B, B], 0 where i is not preferred to j."""
    advantage, groups, scores = step.batch.advantages[:, 0], step.batch.group_ids, score(step)
    same = groups[:, None] == groups
    preferred = same & (advantage[:, None] > advantage)
    pairs = same.float() @ preferred.float().sum(1)
    weight = preferred * (same.sum(1) / pairs.clamp(min=1))[:, None]
    return scores[:, None] - scores, weight.to(scores.dtype)
