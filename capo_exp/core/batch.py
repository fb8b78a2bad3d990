"""RolloutGroups -> tensors, and back and forth between a batch and its micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from capo_exp.config.schema import ModelConfig
from capo_exp.core.types import AdamState, Batch, BatchTotals, PolicyOutput, RolloutGroup
from capo_exp.distributed.world import World

Value = TypeVar("Value")

WIDE = ("topk_probs", "topk_ids", "hidden")
"""Fields of PolicyOutput with a K or an H."""


def collate(groups: Sequence[RolloutGroup], *, pad_token_id: int, device: torch.device) -> Batch:
    """Makes a batch of P groups of G completions: prompts padded on the left, completions on the right; row p
    * G + g is completion g of prompt p. Advantages and surprisal are 0 until the rewards are known;
    padding is masked everywhere."""
    rows = [(group.prompt.token_ids, completion) for group in groups for completion in group.completions]
    width = max(len(prompt) for prompt, _ in rows)
    length = max(len(completion.token_ids) for _, completion in rows)
    input_ids = torch.full((len(rows), width + length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    sampler_log_probs = torch.zeros(len(rows), length)
    for row, (prompt, completion) in enumerate(rows):
        start, end = width - len(prompt), width + len(completion.token_ids)
        input_ids[row, start:end] = torch.tensor(prompt + completion.token_ids)
        attention_mask[row, start:end] = 1
        sampler_log_probs[row, : end - width] = torch.tensor(completion.sampler_log_probs)
    mask = attention_mask[:, width:].bool()
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=mask,
        sampler_log_probs=sampler_log_probs,
        advantages=torch.zeros(mask.shape),
        group_ids=torch.tensor([p for p, group in enumerate(groups) for _ in group.completions]),
        truncated=torch.tensor([completion.truncated for _, completion in rows]),
        surprisal=torch.zeros(len(rows)),
    )
    return Batch(*(tensor.to(device) for tensor in vars(batch).values()))


def totals(batch: Batch) -> BatchTotals:
    """Counts the sizes of an optimiser step."""
    lengths = batch.completion_mask.sum(1)
    return BatchTotals(
        sequences=len(lengths),
        completion_tokens=int(lengths.sum()),
        group_tokens=torch.bincount(batch.group_ids, weights=lengths.double()).long(),
        group_sequences=torch.bincount(batch.group_ids),
    )


def take(batch: Batch, rows: Tensor) -> Batch:
    """Returns the rows with these numbers [b], all columns."""
    return Batch(*(tensor[rows] for tensor in vars(batch).values()))


@dataclass(frozen=True)
class CutSize:
    """How much a micro-batch holds."""

    rows: int
    tokens: int | None = None  # In place of rows: positions, those of padding too
    packed: bool = False  # No position is padding
    share_prompts: bool = False  # A prompt is computed once for the rows of its group

    @classmethod
    def of(cls, model: ModelConfig) -> "CutSize":
        """Reads it from the configuration."""
        rows, tokens = model.micro_batch_size, model.max_tokens_per_micro_batch
        return cls(rows, tokens, model.pack, model.share_prompts)


def split(batch: Batch, size: CutSize) -> list[tuple[Tensor, Batch]]:
    """Cuts micro-batches, each with the row numbers it holds and without columns of padding alone.

    Rows without any advantage come last, for the loss of a micro-batch of such rows alone often has no
    gradient. Among the others, and among these, rows of similar length go together, which saves padding, or
    those of a group, if that saves more of its shared prompt. None of this changes a result. A row that is
    longer than `size.tokens` is a micro-batch of its own.
    """
    lengths = batch.attention_mask.sum(1)
    silent = ~batch.advantages.any(1)
    by_length = _cut(batch, _order(silent, lengths), size)
    if not size.share_prompts:
        return by_length
    groups = batch.group_ids.unique(return_inverse=True)[1]
    longest = torch.zeros_like(lengths).scatter_reduce(0, groups, lengths, "amax")[groups]
    return min(by_length, _cut(batch, _order(silent, longest, groups), size), key=_positions)


def _cut(batch: Batch, order: Tensor, size: CutSize) -> list[tuple[Tensor, Batch]]:
    counts = size.rows if size.tokens is None else _fill(take(batch, order), size.tokens, size.packed)
    return [(rows, _trim(take(batch, rows))) for rows in order.split(counts)]


def _order(*keys: Tensor) -> Tensor:
    """Returns row numbers, sorted by the first key [n], where that is the same by the next, at last as they
    were."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _positions(cuts: Sequence[tuple[Tensor, Batch]]) -> int:
    """Counts what passes over micro-batches compute with shared prompts."""
    wide = [(cut.completion_mask, cut.input_ids.shape[1], len(cut.group_ids.unique())) for _, cut in cuts]
    return sum(mask.numel() + groups * (width - mask.shape[1]) for mask, width, groups in wide)


def padding_share(batch: Batch, size: CutSize) -> float:
    """Returns the share of the positions of all micro-batches that hold no token; with `size.packed` 0."""
    masks = [cut.attention_mask for _, cut in split(batch, size)]
    positions, tokens = sum(mask.numel() for mask in masks), int(batch.attention_mask.sum())
    return 0.0 if size.packed else 1 - tokens / positions


def _fill(batch: Batch, tokens: int, packed: bool) -> list[int]:
    """Counts the rows of each micro-batch: in their order, as long as its positions are at most `tokens`."""
    counts, prompt, completion, taken = [0], 0, 0, 0
    lengths = batch.completion_mask.sum(1)
    for one, other in zip((batch.attention_mask.sum(1) - lengths).tolist(), lengths.tolist(), strict=True):
        prompt, completion, taken = max(prompt, one), max(completion, other), taken + one + other
        positions = taken if packed else (counts[-1] + 1) * (prompt + completion)
        if counts[-1] and positions > tokens:
            counts, prompt, completion, taken = [*counts, 0], one, other, one + other
        counts[-1] += 1
    return counts


def deal_cuts(batch: Batch, size: CutSize, world: World) -> list[tuple[Tensor, Batch]]:
    """Deals the micro-batches of `split`. A process with fewer gets idle ones, so that all make the same
    passes: without row numbers, of one row whose completion is masked."""
    cuts = split(batch, size)
    own = world.deal(cuts)
    rows, shortest = cuts[0]
    return own + [(rows[:0], _idle(shortest))] * (-(-len(cuts) // world.size) - len(own))


def minibatches(group_ids: Tensor, count: int, seed: int) -> list[Tensor]:
    """Returns the row numbers of each optimiser step of one pass over a batch, whose rows have these groups
    [B]: all of them in order for one, else a random partition into `count` nearly equal parts (no empty
    ones), of whole groups where there are as many, else of rows."""
    if count == 1:
        return [torch.arange(len(group_ids))]
    groups, generator = group_ids.unique(), torch.Generator().manual_seed(seed)
    if count <= len(groups):
        order = groups[torch.randperm(len(groups), generator=generator)]
        return [torch.isin(group_ids, part).nonzero().squeeze(1) for part in order.tensor_split(count)]
    order = torch.randperm(len(group_ids), generator=generator)
    return [part for part in order.tensor_split(count) if len(part)]


def join(pieces: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Puts micro-batch results [b, t, ...] back at their rows of a [B, T, ...] tensor; 0 elsewhere.

    A piece is row numbers [b] and values [b, t, ...]; `like` is a [B, T] tensor on the device of the result.
    """
    first = pieces[0][1]
    out = torch.zeros(*like.shape, *first.shape[2:], dtype=first.dtype, device=like.device)
    for rows, values in pieces:
        out[rows, : values.shape[1]] = values
    return out


def join_dealt(pieces: Sequence[tuple[Tensor, Tensor]], like: Tensor, world: World) -> Tensor:
    """Does as `join`, with the pieces of all processes; idle ones hold nothing."""
    if world.size == 1:
        return join(pieces, like)
    shares = world.together(lambda: [(rows.cpu(), values.cpu()) for rows, values in pieces if len(rows)])
    return join([piece for share in shares for piece in share], like.cpu()).to(like.device)


def join_records(pieces: Sequence[tuple[Tensor, Value]], batch: Batch) -> Value:
    """Joins what is known of the micro-batches of an optimiser step, in the rows' own order: each tensor
    [b, t, ...] of a record, and of the records in it, to [B, T, ...]. Of batches the advantages are
    joined."""
    rows = [numbers for numbers, _ in pieces]

    def merge(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Batch):
            return replace(batch, advantages=merge([value.advantages for value in values]))
        if isinstance(first, Tensor):
            return join(list(zip(rows, values, strict=True)), batch.completion_mask)
        if isinstance(first, dict):
            return {key: merge([value[key] for value in values]) for key in first}
        if is_dataclass(first) and not isinstance(first, (type, AdamState)):
            return replace(first, **{name: merge([vars(v)[name] for v in values]) for name in vars(first)})
        return first  # the same for all

    return merge([record for _, record in pieces])


def narrow(record: Any) -> Any:
    """Returns a record whose output has 0 in place of K and H: tensors of their own, for a view would keep
    all of what it is of."""
    output = vars(record.output).items()
    empty = {name: value.new_empty(*value.shape[:2], 0) for name, value in output if name in WIDE}
    return replace(record, output=replace(record.output, **empty))


def join_shared(
    pieces: Sequence[tuple[Tensor, Value]],
    outputs: Sequence[tuple[Tensor, PolicyOutput]],
    batch: Batch,
    world: World,
) -> Value:
    """Joins the records of all processes' micro-batches; what has a K or an H stays in its process.

    Args:
        pieces: as of `join_records`, this process's; the records have an `output`.
        outputs: of this process's micro-batches, idle ones, too.
        batch: the whole.
        world: all of which call this.
    """
    if world.size == 1:
        return join_records(pieces, batch)
    shares = world.together(lambda: [(rows.cpu(), _move(narrow(record), "cpu")) for rows, record in pieces])
    everyone = [piece for share in shares for piece in share]
    joined: Any = _move(join_records(everyone, _move(batch, "cpu")), batch.input_ids.device)
    own = torch.cat([rows for rows, _ in outputs]).sort().values
    places = [torch.searchsorted(own, rows) for rows, _ in outputs]

    def wide(name: str) -> Tensor:
        parts = [getattr(output, name) for _, output in outputs]
        return join(list(zip(places, parts, strict=True)), batch.completion_mask[own])

    kept = {name: wide(name) for name in WIDE}
    return replace(joined, output=replace(joined.output, rows=own, **kept))


def _move(value: Any, device: torch.device | str) -> Any:
    """Copies a record to a device, without an optimiser model in it."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _move(each, device) for key, each in value.items()}
    if isinstance(value, AdamState):
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _move(each, device) for name, each in vars(value).items()})
    return value


def _idle(batch: Batch) -> Batch:
    row = take(batch, torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device))
    return replace(
        row,
        input_ids=row.input_ids[:, -2:],
        attention_mask=torch.ones_like(row.attention_mask[:, -2:]),
        completion_mask=torch.zeros_like(row.completion_mask[:, :1]),
        sampler_log_probs=row.sampler_log_probs[:, :1],
        advantages=row.advantages[:, :1],
    )


def _trim(batch: Batch) -> Batch:
    longest = int(batch.completion_mask.sum(1).max())
    width = batch.input_ids.shape[1] - batch.completion_mask.shape[1]
    left = int(batch.attention_mask.argmax(1).min())
    return replace(
        batch,
        input_ids=batch.input_ids[:, left : width + longest],
        attention_mask=batch.attention_mask[:, left : width + longest],
        completion_mask=batch.completion_mask[:, :longest],
        sampler_log_probs=batch.sampler_log_probs[:, :longest],
        advantages=batch.advantages[:, :longest],
    )
