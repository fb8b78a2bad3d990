"""Token losses -> scalar. Called once a micro-batch; the results of an optimiser step's micro-batches add up
to its loss.

Every function: values [B, T], keep_mask [B, T] bool, the batch, totals of the whole step -> scalar with a
graph (also when nothing is kept: then it is 0). The denominator is the difference: over all completion
tokens, rejecting a token changes nothing else; over kept tokens, the survivors are weighted up.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import Count
from capo_exp.config.declare import whole_step
from capo_exp.core.masked import masked_mean, masked_sum
from capo_exp.core.types import Batch, BatchTotals

Values = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Loss = Float[Tensor, ""]


def sequence_mean(values: Values, keep_mask: Mask, batch: Batch, totals: BatchTotals) -> Loss:
    """Returns the mean over each completion's kept tokens, then over completions: survivors are weighted up.

    Source: GRPO, arXiv 2402.03300, eq. 3; denominator max(1, kept) as in the CAPO authors' program.
    """
    del batch
    return masked_mean(values, keep_mask, 1).sum() / totals.sequences


def sequence_mean_over_all(values: Values, keep_mask: Mask, batch: Batch, totals: BatchTotals) -> Loss:
    """Returns the sum of each completion's kept tokens over all its tokens, then the mean over
    completions."""
    lengths = batch.completion_mask.sum(1).clamp(min=1)
    return (masked_sum(values, keep_mask, 1) / lengths).sum() / totals.sequences


def constant_length_mean(
    values: Values, keep_mask: Mask, batch: Batch, totals: BatchTotals, *, length: Count
) -> Loss:
    """Returns the sum of each completion's kept tokens over a constant length, then the mean over
    completions; length 1 is the sum.

    Source: Dr. GRPO, arXiv 2503.20783.
    """
    del batch
    return masked_sum(values, keep_mask) / (length * totals.sequences)


def token_mean(values: Values, keep_mask: Mask, batch: Batch, totals: BatchTotals) -> Loss:
    """Returns the sum of kept tokens over all completion tokens of the step: long completions count more.

    Source: DAPO, arXiv 2503.14476, eq. 8.
    """
    del batch
    return masked_sum(values, keep_mask) / max(1, totals.completion_tokens)


@whole_step
def token_mean_over_kept(values: Values, keep_mask: Mask, batch: Batch, totals: BatchTotals) -> Loss:
    """Returns the mean over the kept tokens of the step, which are counted before the first gradient:
    survivors are weighted up."""
    del batch
    assert totals.kept_tokens is not None, "whole_step has them counted"
    return masked_sum(values, keep_mask) / max(1, totals.kept_tokens)


def prompt_token_mean(values: Values, keep_mask: Mask, batch: Batch, totals: BatchTotals) -> Loss:
    """Returns the sum of kept tokens over all completion tokens of their prompt, then the mean over prompts.

    Source: CPGD, arXiv 2505.12504, the practical loss.
    """
    tokens = totals.group_tokens[batch.group_ids].clamp(min=1)
    prompts = totals.group_tokens.count_nonzero().clamp(min=1)
    return (masked_sum(values, keep_mask, 1) / tokens).sum() / prompts
