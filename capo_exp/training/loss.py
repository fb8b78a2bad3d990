"""The loss of a micro-batch: token losses, the KL to the reference, the selection, the aggregation."""

from dataclasses import dataclass, replace

from torch import Tensor

from capo_exp.algorithms.kl import kl_k3
from capo_exp.algorithms.protocols import Algorithm
from capo_exp.core.types import Batch, BatchTotals, Selection, TokenLossInput


@dataclass(frozen=True)
class Loss:
    """A micro-batch's part of the loss of an optimiser step."""

    value: Tensor  # Scalar with a graph; the parts of a step's micro-batches add up to its loss
    kl: Tensor  # [B, T] nats, kl_k3 to the reference, without a graph
    clipped: Tensor  # [B, T] bool


def compute_loss(
    algorithm: Algorithm,
    inputs: TokenLossInput,
    ref_log_probs: Tensor,
    selection: Selection,
    batch: Batch,
    totals: BatchTotals,
) -> Loss:
    """Computes the loss of a micro-batch; ref_log_probs [B, T] nats are the policy's own where there is no
    reference, totals those of the whole optimiser step."""
    token_loss = algorithm.token_loss(replace(inputs, ref_log_probs=ref_log_probs))
    values = token_loss.values
    if algorithm.kl_coefficient:  # 0 times an infinite estimate would be NaN
        values = values + algorithm.kl_coefficient * algorithm.kl_estimator(inputs.log_probs, ref_log_probs)
    value = algorithm.aggregation(selection.weighed(values), selection.keep_mask, batch, totals)
    return Loss(value, kl_k3(inputs.log_probs.detach(), ref_log_probs), token_loss.clipped)
