"""The loss of a micro-batch: token losses, the KL to the reference, the selection, the aggregation."""

from dataclasses import dataclass, replace

from torch import Tensor

from capo_exp.algorithms.kl import kl_k3
from capo_exp.algorithms.protocols import Algorithm
from capo_exp.core.types import Batch, BatchTotals, Selection, TokenLossInput
from capo_exp.training.returned import as_tensor, as_token_loss


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
    mask = batch.completion_mask
    got = algorithm.token_loss(replace(inputs, ref_log_probs=ref_log_probs))
    token_loss = as_token_loss(got, mask, "algo.token_loss", algorithm.token_loss)
    values = token_loss.values
    if algorithm.kl_coefficient:  # 0 times an infinite estimate would be NaN
        kl = algorithm.kl_estimator(inputs.log_probs, ref_log_probs)
        as_tensor(kl, "B T", mask.shape, "algo.kl_estimator", algorithm.kl_estimator)
        values = values + algorithm.kl_coefficient * kl
    value = algorithm.aggregation(selection.weighed(values), selection.keep_mask, batch, totals)
    as_tensor(value, "", (), "algo.aggregation", algorithm.aggregation)
    return Loss(value, kl_k3(inputs.log_probs.detach(), ref_log_probs), token_loss.clipped)
