"""DASH (arXiv 2505.17218): gradient filtering. Its preemptive sampling is rollout.chunking=per_step."""

from jaxtyping import Bool
from torch import Tensor

from capo_exp.algorithms.kinds import NonNegative
from capo_exp.core.types import Batch


def advantage_above(batch: Batch, *, threshold: NonNegative) -> Bool[Tensor, " B"]:
    """Keeps completions with |A| > threshold; if there is none, the first, as in the authors' program.

    The learner never sees the others, which saves their forward and backward passes; whether they still count
    in the denominator is algo.filter_denominator. Source: arXiv 2505.17218, gradient filtering.
    """
    kept = batch.advantages.abs().amax(1) > threshold
    kept[0] |= ~kept.any()
    return kept
