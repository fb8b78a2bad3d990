"""C3PO: a fixed budget of tokens for each rollout step (Ring-lite, arXiv 2506.14731).

Where a step has several minibatches they share the budget: the gradient of each is over all of it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_exp.algorithms.kinds import Count
from capo_exp.core.masked import masked_sum
from capo_exp.core.types import Batch, BatchTotals


def within_budget(batch: Batch, *, tokens: Count) -> Bool[Tensor, " B"]:
    """Keeps completions as long as their tokens fit into the budget: the first of each prompt, then the
    second of each, and so on. What comes first does not depend on lengths; the very first always stays.

    Source: arXiv 2506.14731, C3PO: responses are sampled until the budget of a step is spent.
    """
    same = batch.group_ids[:, None] == batch.group_ids
    place = same.tril().sum(1)
    order = place.argsort(stable=True)
    spent = batch.completion_mask.sum(1)[order].cumsum(0)
    fits = spent <= tokens
    fits[0] = True
    return torch.zeros_like(fits).index_copy(0, order, fits)


def budget_mean(
    values: Float[Tensor, "B T"],
    keep_mask: Bool[Tensor, "B T"],
    batch: Batch,
    totals: BatchTotals,
    *,
    tokens: Count,
) -> Float[Tensor, ""]:
    """Returns the sum of kept tokens over the budget, whatever the step holds: a token weighs the same in
    every step. Source: arXiv 2506.14731, C3PO's objective."""
    del batch, totals
    return masked_sum(values, keep_mask) / tokens
