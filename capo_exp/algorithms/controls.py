"""Controls for CAPO's selection: what else could have rejected as many tokens? Not of a paper.

A score says how strongly a token should be rejected; the rate is given, or matched to CAPO's.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from capo_exp.algorithms.kinds import Share
from capo_exp.algorithms.protocols import Select
from capo_exp.config.declare import whole_step
from capo_exp.core.masked import masked_top
from capo_exp.core.types import Scored, Selection

Score = Float[Tensor, "B T"]
ScoreFunction = Callable[[Scored], Tensor]
"""[B, T]: the higher, the sooner rejected."""


def random_score(scored: Scored) -> Score:
    """Returns nothing but chance, the same for the same run seed and step."""
    generator = torch.Generator().manual_seed(scored.seed)
    values = torch.rand(scored.batch.completion_mask.shape, generator=generator)
    return values.to(scored.output.log_probs.device)


def low_probability_score(scored: Scored) -> Score:
    """Puts the least probable sampled tokens first."""
    return -scored.output.log_probs


def low_entropy_score(scored: Scored) -> Score:
    """Puts the tokens whose distribution has the least entropy first: at a rate of 0.8 the 20 % of "forking"
    tokens are left. Source: arXiv 2506.01939, the 80/20 rule; TRL's top_entropy_quantile."""
    return -scored.output.entropy


def advantage_score(scored: Scored) -> Score:
    """Puts the largest |advantage| first, ties by chance."""
    return scored.batch.advantages.abs() + 1e-6 * random_score(scored)


def policy_shift_score(scored: Scored) -> Score:
    """Puts the largest m_F first: CAPO's own order."""
    return scored.shifts.policy_shift


@whole_step
def at_rate(scored: Scored, *, score: ScoreFunction, rate: Share) -> Selection:
    """Rejects the share `rate` of the step's tokens with the highest scores."""
    count = round(rate * int(scored.batch.completion_mask.sum()))
    return _reject_highest(scored, score, count)


@whole_step
def at_matched_rate(scored: Scored, *, score: ScoreFunction, matched: Select) -> Selection:
    """Rejects as many of the step's tokens as `matched` does, but those with the highest scores."""
    mask = scored.batch.completion_mask
    return _reject_highest(scored, score, int((mask & ~matched(scored).keep_mask).sum()))


def _reject_highest(scored: Scored, score: ScoreFunction, count: int) -> Selection:
    mask = scored.batch.completion_mask
    rejected = masked_top(score(scored), mask, count)
    return Selection(keep_mask=mask & ~rejected, rejected_by={"score": rejected})
