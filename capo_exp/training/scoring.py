"""What is predicted of tokens and of a step before it is taken; pure functions that the learner calls."""

from dataclasses import dataclass

from torch import Tensor

from capo_exp.core.masked import unpack
from capo_exp.core.types import AdamState, Batch, BatchShifts, PolicyOutput, Scored, StepRecord, TokenShifts
from capo_exp.curvature.model import (
    apply_row_gradients,
    batch_shifts,
    mean_row_gradients,
    pack_batch,
    predict_shifts,
)
from capo_exp.distributed.world import World


@dataclass(frozen=True)
class StepModel:
    """What the shifts of an optimiser step are predicted with."""

    learning_rate: float
    moments: AdamState | None  # None is SGD
    seed: int  # Of a selection that draws


def score(batch: Batch, output: PolicyOutput, old: Tensor, step: StepModel) -> Scored:
    """Predicts the shifts [B, T] of a micro-batch, for completion tokens only; `old` are its old log-probs
    [B, T]."""
    mask = batch.completion_mask
    tokens = pack_batch(output, batch, batch.advantages, mask)
    packed = predict_shifts(tokens, learning_rate=step.learning_rate, state=step.moments)
    shifts = TokenShifts(*(unpack(values, mask) for values in packed))
    return Scored(batch, output, shifts, old, step.learning_rate, step.moments, step.seed)


def predict_step(
    record: StepRecord,
    optimizer_model: AdamState | None,
    learning_rate: float,
    moments: AdamState | None,
    world: World,
) -> tuple[BatchShifts, AdamState | None]:
    """Predicts the shifts of the kept tokens' mean update; gives the optimiser model's table that step, in
    place, and returns the optimiser model after it, too. The moments to predict with are the optimiser
    model's own, if it has any, or the real optimiser's."""
    credit = record.selection.weighed(record.batch.advantages)
    tokens = pack_batch(record.output, record.batch, credit, record.selection.keep_mask)
    rows = mean_row_gradients(tokens, world)
    predicted = batch_shifts(tokens, rows, learning_rate=learning_rate, state=moments, world=world)
    return predicted, None if optimizer_model is None else apply_row_gradients(optimizer_model, rows)
