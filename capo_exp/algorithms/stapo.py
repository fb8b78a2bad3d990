"""STAPO: spurious-token-aware policy optimisation (Liu et al. 2026, arXiv 2602.15620)."""

from capo_exp.algorithms.kinds import Share
from capo_exp.config.declare import whole_step
from capo_exp.core.masked import masked_quantile
from capo_exp.core.types import Scored, Selection


@whole_step
def silence_spurious(scored: Scored, *, probability_max: Share, entropy_share: Share) -> Selection:
    """Rejects tokens of positive advantage that were improbable, pi < probability_max, where the policy was
    sure, entropy below that quantile of the step's tokens: rare mistakes that a right answer would reward.

    0 of either rejects nothing. Source: arXiv 2602.15620, the mask S2T.
    """
    mask, output = scored.batch.completion_mask, scored.output
    sure = output.entropy < masked_quantile(output.entropy, mask, entropy_share)
    improbable = output.log_probs.exp() < probability_max
    spurious = mask & (scored.batch.advantages > 0) & improbable & sure
    return Selection(mask & ~spurious, rejected_by={"spurious": spurious})
