"""OPSM: off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556)."""

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.algorithms.surrogates import LogRatio
from capo_exp.core.masked import masked_mean
from capo_exp.core.types import Scored, Selection


def mask_negative(scored: Scored, *, log_ratio: LogRatio, divergence_max: NonNegativeOrInf) -> Selection:
    """Rejects the tokens with A < 0 of a completion whose mean of ln(sampler / policy) over its tokens is
    above divergence_max [nats]: mistakes that the policy would hardly make any more.

    Source: arXiv 2512.02556, section 3.1; TRL's off_policy_mask_threshold.
    """
    mask = scored.batch.completion_mask
    far = masked_mean(-log_ratio(scored), mask, 1) > divergence_max
    stale = mask & (scored.batch.advantages < 0) & far[:, None]
    return Selection(mask & ~stale, rejected_by={"off_policy": stale})
