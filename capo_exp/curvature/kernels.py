"""Triton kernels over (token, id) pairs sorted by table row: what `model` computes in torch, for a GPU.

A program takes a few neighbouring pairs, most of which share a row, so that the row comes from memory once
and then from the cache. A long row's sum is cut into pieces, so that no program has much more to do than
others. A pair, and a row of the moments, belong to one program of a launch: no atomics, and the same bits at
every run. All sums are in float32.

The module imports Triton; `backend` says whether it is to be used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton import knobs

PAIRS, SLICE, PIECE = 4, 512, 256
"""Pairs and columns of a block, pairs of a row that are summed at once; docs/BENCHMARKS.md has others."""
INTERPRETED = knobs.runtime.interpret
"""Whether the kernels run as Python on a CPU (TRITON_INTERPRET=1 before this module is imported)."""


def along_adam(
    hidden: Float[Tensor, "N H"],
    slots: Int[Tensor, "N K"],
    moments: tuple[Float[Tensor, "rows H"], Float[Tensor, "rows H"]],
    weights: Float[Tensor, "N K"],
    in_first: float,
    in_second: float,
    eps: float,
) -> Float[Tensor, "N K"]:
    """Returns <d, h> of each pair, d = (m + in_first g) / (sqrt(q + in_second g^2) + eps) with g = weight x h
    and the moments m, q of the pair's slot."""
    return _change(hidden, slots, moments, weights, (in_first, in_second, eps), adam=True)


def along_rows(
    hidden: Float[Tensor, "N H"], places: Int[Tensor, "N K"], step: Float[Tensor, "R H"]
) -> Float[Tensor, "N K"]:
    """Returns <step, h> of each pair, with the row of the step at the pair's place."""
    return _change(hidden, places, (step, step), hidden, (0.0, 0.0, 0.0), adam=False)


def _change(
    hidden: Tensor,
    slots: Tensor,
    tables: tuple[Tensor, Tensor],
    weights: Tensor,
    numbers: tuple[float, float, float],
    *,
    adam: bool,
) -> Tensor:
    hidden, slots, weights = hidden.contiguous(), slots.contiguous(), weights.contiguous()
    order, change = slots.view(-1).argsort(), hidden.new_empty(slots.shape)
    pairs, width = order.numel(), hidden.shape[1]
    constants = _block(width, SUPPORT=slots.shape[1], ADAM=adam, PAIRS=PAIRS)
    if pairs:
        with torch.cuda.device_of(hidden):
            _change_kernel[triton.cdiv(pairs, PAIRS),](
                order, slots, weights, hidden, *tables, change, pairs, width, *numbers, **constants
            )
    return change


def _block(width: int, **constants: Any) -> dict[str, Any]:
    """Returns a kernel's constants with the columns of a block, none of which is wholly beyond a narrow
    row."""
    return {"SLICE": min(SLICE, triton.next_power_of_2(width)), **constants}


def sum_rows(
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " pairs"],
    weights: Float[Tensor, " pairs"],
    starts: Int[Tensor, " bounds"],
) -> Float[Tensor, "R H"]:
    """Sums weight x hidden over each row's pairs, which lie between its start and the next. Each
    PIECE-th pair begins a new sum, which is added to that of its row afterwards."""
    rows, pairs, width = len(starts) - 1, len(tokens), hidden.shape[1]
    cuts = torch.arange(0, pairs, PIECE, device=starts.device)
    row = torch.searchsorted(starts, cuts, right=True) - 1
    next_cut = starts // PIECE + 1  # a cut where a row starts has nothing to do
    cut_ends = torch.where(starts[row] == cuts, cuts, starts[row + 1].minimum(cuts + PIECE))
    ends = torch.cat([starts[1:].minimum(next_cut[:-1] * PIECE), cut_ends])
    begins, last = torch.cat([starts[:-1], cuts]), (starts[1:] + PIECE - 1) // PIECE
    hidden, sums = hidden.contiguous(), hidden.new_empty(len(begins), width)
    pieces, cut_rows = (_block(width, PAIRS=PAIRS, CUTS=cut) for cut in (False, True))
    slices = triton.cdiv(width, pieces["SLICE"])
    if rows:
        with torch.cuda.device_of(hidden):
            _sums_kernel[len(begins), slices](tokens, weights, begins, ends, hidden, sums, width, **pieces)
            between = next_cut, last, sums[rows:]
            _sums_kernel[rows, slices](tokens, weights, *between, sums, width, **cut_rows)
    return sums[:rows]


def decay(
    first: Float[Tensor, "rows H"],
    second: Float[Tensor, "rows H"],
    slots: Int[Tensor, " R"],
    means: Float[Tensor, "R H"],
    betas: tuple[float, float],
    seed: int,
) -> None:
    """Moves both moments of these rows towards their mean gradient and its square, in place; a table in
    bfloat16 is rounded at random, which the seed decides."""
    rows, width = means.shape
    numbers = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], seed)
    constants = _block(width, ROUND=first.dtype == torch.bfloat16)
    if rows:
        with torch.cuda.device_of(means):
            _decay_kernel[rows, triton.cdiv(width, constants["SLICE"])](
                slots, means.contiguous(), first, second, width, *numbers, **constants
            )


@triton.jit(do_not_specialize=["pairs"])
def _change_kernel(
    order, slots, weights, hidden, first, second, change, pairs, width, in_first, in_second, eps,
    SUPPORT: tl.constexpr, ADAM: tl.constexpr, PAIRS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Writes each pair's change."""
    place = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    real = place < pairs
    pair = tl.load(order + place, real, 0)
    row, token = tl.load(slots + pair, real, 0) * width, pair // SUPPORT * width
    total = tl.zeros([PAIRS, SLICE], tl.float32)
    for begin in range(0, width, SLICE):
        columns = begin + tl.arange(0, SLICE)
        inside = real[:, None] & (columns < width)[None, :]
        h = tl.load(hidden + token[:, None] + columns[None, :], inside, 0.0)
        direction = tl.load(first + row[:, None] + columns[None, :], inside, 0.0).to(tl.float32)
        if ADAM:
            gradient = tl.load(weights + pair, real, 0.0)[:, None] * h
            spread = tl.load(second + row[:, None] + columns[None, :], inside, 1.0).to(tl.float32)
            spread += in_second * gradient * gradient
            direction = (direction + in_first * gradient) / (tl.sqrt(spread) + eps)
        total += direction * h
    tl.store(change + pair, tl.sum(total, 1), real)


@triton.jit
def _sums_kernel(
    tokens, weights, begins, ends, hidden, sums, width,
    PAIRS: tl.constexpr, SLICE: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """Writes the slice of sum weight x hidden over the pairs between a begin and its end, or adds what lies
    between two cuts."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    total = tl.zeros([PAIRS, SLICE], tl.float32)
    begin, end = tl.load(begins + row), tl.load(ends + row)
    for at in range(begin, end, PAIRS):
        place = at + tl.arange(0, PAIRS)
        inside = (place < end)[:, None] & (columns < width)[None, :]
        if CUTS:
            total += tl.load(hidden + place[:, None] * width + columns[None, :], inside, 0.0)
        else:
            token = tl.load(tokens + place, place < end, 0)
            weight = tl.load(weights + place, place < end, 0.0)
            total += weight[:, None] * tl.load(
                hidden + token[:, None] * width + columns[None, :], inside, 0.0
            )
    at = sums + row * width + columns
    if not CUTS:
        tl.store(at, tl.sum(total, 0), columns < width)
    elif begin < end:
        tl.store(at, tl.load(at, columns < width, 0.0) + tl.sum(total, 0), columns < width)


@triton.jit
def _round(value, noise):
    """Makes the last 16 bits zero, up or down by chance: a number that bfloat16 holds exactly."""
    bits = value.to(tl.uint32, bitcast=True) + noise
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def _decay_kernel(
    slots, means, first, second, width, beta1, in_first, beta2, in_second, seed,
    ROUND: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Moves one row's slice of both moments towards its mean gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    mean = tl.load(means + row * width + columns, columns < width, 0.0)
    at = tl.load(slots + row) * width + columns
    m = tl.load(first + at, columns < width, 0.0).to(tl.float32)
    q = tl.load(second + at, columns < width, 0.0).to(tl.float32)
    m, q = m * beta1 + mean * in_first, q * beta2 + mean * mean * in_second
    if ROUND:
        noise = tl.randint(seed, at.to(tl.uint32)).to(tl.uint32)
        m, q = _round(m, noise & 0xFFFF), _round(q, noise >> 16)
    tl.store(first + at, m, columns < width)
    tl.store(second + at, q, columns < width)
