"""DASH (arXiv 2505.17218): gradient filtering. Its preemptive sampling is rollout.chunking=per_step."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import Count, NonNegative
from capo_exp.core.masked import masked_sum
from capo_exp.core.types import Batch, BatchTotals


def advantage_above(batch: Batch, *, threshold: NonNegative) -> Bool[Tensor, " B"]:
    """Keeps completions with |A| > threshold; if there is none, the first of the batch.

    The learner never sees the others, which saves their forward and backward passes; whether they still count
    in the denominator is algo.filter_denominator. Source: arXiv 2505.17218, gradient filtering.
    """
    kept = batch.advantages.abs().amax(1) > threshold
    kept[0] |= ~kept.any()
    return kept


def advantage_above_in_prompt(batch: Batch, *, threshold: NonNegative) -> Bool[Tensor, " B"]:
    """Keeps completions with |A| > threshold, and the first of a prompt that has none.

    Source: the authors' program, which filters inside each micro-batch: the completions of one prompt.
    """
    kept = batch.advantages.abs().amax(1) > threshold
    same = batch.group_ids[:, None] == batch.group_ids
    first = ~same.tril(-1).any(1)
    return kept | (first & ~(same & kept).any(1))


def prompt_mean(
    values: Float[Tensor, "B T"],
    keep_mask: Bool[Tensor, "B T"],
    batch: Batch,
    totals: BatchTotals,
    *,
    length: Count,
) -> Float[Tensor, ""]:
    """Returns the sum of each completion's kept tokens over a constant length, averaged over the completions
    of each prompt that the step holds, then over prompts: what the filter leaves of a prompt weighs as much
    as a whole one.

    Source: the authors' program, whose micro-batch is a prompt.
    """
    weights = torch.reciprocal(totals.group_sequences[batch.group_ids].to(values.dtype))
    prompts = totals.group_sequences.count_nonzero()
    return (masked_sum(values, keep_mask, 1) * weights).sum() / (length * prompts)
