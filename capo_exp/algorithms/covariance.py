"""Clip-Cov and KL-Cov: the few tokens whose log-prob and advantage vary together most are what lowers the
entropy (Cui et al. 2025, arXiv 2505.22617)."""

import torch
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegative, NotNan, Share
from capo_exp.config.declare import ordered, whole_step
from capo_exp.core.masked import masked_mean, masked_top
from capo_exp.core.types import Scored, Selection, TokenLoss, TokenLossInput


@whole_step
@ordered("covariance_min", "covariance_max")
def clip_covariance(
    scored: Scored, *, share: Share, covariance_min: NotNan, covariance_max: NotNan
) -> Selection:
    """Rejects a share of the step's tokens, at least one, drawn by chance among those with a covariance
    strictly between the two bounds; fewer if there are fewer, none for a share of 0.

    Source: arXiv 2505.22617, Clip-Cov; verl's clip_cov, which leaves out tokens that PPO's clip cuts anyway.
    """
    mask, covariance = scored.batch.completion_mask, _covariance(scored)
    among = mask & (covariance > covariance_min) & (covariance < covariance_max)
    generator = torch.Generator().manual_seed(scored.seed)
    chance = torch.rand(mask.shape, generator=generator).to(covariance.device)
    clipped = masked_top(chance, among, _count(share, mask))
    return Selection(mask & ~clipped, rejected_by={"covariance": clipped})


@whole_step
def penalise_covariance(inputs: TokenLossInput, *, share: Share, coefficient: NonNegative) -> TokenLoss:
    """Returns -r A per token, plus coefficient |ln r| on the share of the step's tokens with the largest
    covariance: only they are held where the policy that sampled was. It acts from the second update on.

    Source: arXiv 2505.22617, KL-Cov; verl's kl_cov.
    """

    def largest(step: Scored) -> Tensor:
        mask = step.batch.completion_mask
        return masked_top(_covariance(step), mask, _count(share, mask))

    held = coefficient * inputs.log_ratio.abs() * inputs.of_step(largest)
    values = held - inputs.log_ratio.exp() * inputs.advantages
    return TokenLoss(values=values, clipped=torch.zeros_like(inputs.completion_mask))


def _covariance(scored: Scored) -> Tensor:
    """Returns (A - mean A) (ln pi - mean ln pi) [B, T]; its mean over the step's tokens is the covariance."""
    mask = scored.batch.completion_mask
    columns = (scored.batch.advantages, scored.output.log_probs)
    advantages, log_probs = (values - masked_mean(values, mask) for values in columns)
    return advantages * log_probs


def _count(share: float, mask: Tensor) -> int:
    return max(int(share * mask.sum()), share > 0)
