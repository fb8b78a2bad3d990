"""Micro-batches' results as one, in the rows' own order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from capo_exp.core.batch import join
from capo_exp.core.types import Batch, PolicyOutput, Selection, StepRecord, TokenShifts

Item = TypeVar("Item")
Value = TypeVar("Value")


def join_fields(
    pieces: Sequence[tuple[Tensor, Item]], batch: Batch, kind: type[Value], get: Callable[[Item], Value]
) -> Value:
    """A dataclass of [b, t, ...] tensors of each micro-batch as one of [B, T, ...] tensors."""
    return kind(
        **{
            name: join([(rows, vars(get(piece))[name]) for rows, piece in pieces], batch.completion_mask)
            for name in vars(get(pieces[0][1]))
        }
    )


def join_records(pieces: Sequence[tuple[Tensor, StepRecord]], batch: Batch) -> StepRecord:
    """The micro-batches' records as one, in the rows' own order."""

    def field(get: Callable[[StepRecord], Tensor]) -> Tensor:
        return join([(rows, get(piece)) for rows, piece in pieces], batch.completion_mask)

    reasons = pieces[0][1].selection.rejected_by
    weighed = pieces[0][1].selection.weights is not None
    return StepRecord(
        batch=replace(batch, advantages=field(lambda r: r.batch.advantages)),
        output=join_fields(pieces, batch, PolicyOutput, lambda r: r.output),
        old_log_probs=field(lambda r: r.old_log_probs),
        weights=field(lambda r: r.weights),
        kl=field(lambda r: r.kl),
        shifts=join_fields(pieces, batch, TokenShifts, lambda r: r.shifts),
        selection=Selection(
            keep_mask=field(lambda r: r.selection.keep_mask),
            rejected_by={why: field(lambda r, why=why: r.selection.rejected_by[why]) for why in reasons},
            weights=field(lambda r: r.selection.weights) if weighed else None,  # pyright: ignore
        ),
        clipped=field(lambda r: r.clipped),
    )
