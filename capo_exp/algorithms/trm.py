"""TRM: trust-region masking (Li et al. 2025, arXiv 2512.23075)."""

from capo_exp.algorithms.kinds import NonNegativeOrInf
from capo_exp.algorithms.kl import kl_k3
from capo_exp.algorithms.surrogates import LogRatio
from capo_exp.core.types import Scored, Selection


def mask_completions(scored: Scored, *, log_ratio: LogRatio, divergence_max: NonNegativeOrInf) -> Selection:
    """Rejects a whole completion if KL(sampler || policy) of any of its tokens is above divergence_max
    [nats].

    The bound on the surrogate's error depends on the largest divergence of a completion's tokens, which no
    decision token by token controls. Source: arXiv 2512.23075, with the k3 estimate by the sampled token for
    the KL over the vocabulary, which a sampler does not give: verl's seq_max_k3.
    """
    mask, ratio = scored.batch.completion_mask, log_ratio(scored)
    beyond = mask & (kl_k3(ratio.new_zeros(()), ratio) > divergence_max)
    outside = mask & beyond.any(1, keepdim=True)
    return Selection(mask & ~outside, rejected_by={"trust_region": outside})
