"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from capo_exp.algorithms.kinds import Positive
from capo_exp.algorithms.surrogates import spread
from capo_exp.config.declare import compares_group, needs_reference, regresses, whole_step
from capo_exp.core.masked import masked_sum
from capo_exp.core.types import Scored, TokenLoss, TokenLossInput


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
    value, slope = (inputs.of_step(partial(part, beta=beta)) for part in (_losses, _slopes))
    values = spread(value, slope, inputs.log_probs, inputs.completion_mask)
    return TokenLoss(values=values, clipped=torch.zeros_like(inputs.completion_mask))


def _losses(step: Scored, beta: float) -> Tensor:
    margin, weight = _pairs(step, beta)
    loss = weight * softplus(-margin)
    return (loss.sum(1) + loss.sum(0)) / 2


def _slopes(step: Scored, beta: float) -> Tensor:
    margin, weight = _pairs(step, beta)
    pull = beta * weight * (-margin).sigmoid()
    return pull.sum(0) - pull.sum(1)


def _pairs(step: Scored, beta: float) -> tuple[Tensor, Tensor]:
    """Returns beta (D_i - D_j) and the weight of the pair [B, B], 0 where i is not preferred to j."""
    assert step.ref_log_probs is not None, "needs_reference has it computed"
    advantage, groups = step.batch.advantages[:, 0], step.batch.group_ids
    log_ratio = masked_sum(step.output.log_probs - step.ref_log_probs, step.batch.completion_mask, 1)
    same = groups[:, None] == groups
    preferred = same & (advantage[:, None] > advantage)
    pairs = same.float() @ preferred.float().sum(1)
    weight = preferred * (same.sum(1) / pairs.clamp(min=1))[:, None]
    return beta * (log_ratio[:, None] - log_ratio), weight.to(log_ratio.dtype)
