"""Token losses -> scalar. Called once a micro-batch; the results of an optimiser step's micro-batches add up
to its loss.

Every function: values [B, T], keep_mask and completion_mask [B, T] bool, totals of the whole step -> scalar
with a graph (also when nothing is kept: then it is 0).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.masked import masked_mean, masked_sum
from capo_exp.types import BatchTotals

Values = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Loss = Float[Tensor, ""]


def sequence_mean(
    values: Values,
    keep_mask: Mask,
    completion_mask: Mask,
    totals: BatchTotals,
) -> Loss:
    """Mean over each completion's kept tokens, then over completions: survivors are weighted up.

    Source: GRPO, arXiv 2402.03300, eq. 3; denominator max(1, kept) as in the CAPO authors' program.
    """
    del completion_mask
    return masked_mean(values, keep_mask, 1).sum() / totals.sequences


def constant_length_mean(
    values: Values,
    keep_mask: Mask,
    completion_mask: Mask,
    totals: BatchTotals,
    *,
    length: int,
) -> Loss:
    """Sum of each completion's kept tokens over a constant length, then mean over completions: no
    up-weighting.

    Source: Dr. GRPO, arXiv 2503.20783.
    """
    del completion_mask
    return masked_sum(values, keep_mask) / (length * totals.sequences)


def token_mean(
    values: Values,
    keep_mask: Mask,
    completion_mask: Mask,
    totals: BatchTotals,
) -> Loss:
    """Sum of kept tokens over all completion tokens of the step: long completions count more, no
    up-weighting.

    Source: DAPO, arXiv 2503.14476, eq. 8.
    """
    del completion_mask
    return masked_sum(values, keep_mask) / max(1, totals.completion_tokens)
