"""The table of moments that the optimiser model keeps: it grows and takes its steps in place."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capo_exp.curvature.backend import find_kernels

# Elements of the rows that take their step at once: what the step holds beside the table.
_BLOCK_ELEMENTS = 2**22


def grow(table: Float[Tensor, "rows H"], rows: int, most: int) -> Float[Tensor, "more H"]:
    """Returns the table with zeros up to `rows`: in its own storage where that has room, else in one of
    twice the rows, `most` at most. The table has to be all that its storage holds."""
    width = table.shape[1]
    if table.untyped_storage().nbytes() < rows * width * table.element_size():
        room = table.new_zeros(min(max(rows, 2 * len(table)), most), width)
        room[: len(table)] = table
        table = room
    return table.as_strided((rows, width), (width, 1))


def decay(
    first: Float[Tensor, "rows H"],
    second: Float[Tensor, "rows H"],
    slots: Int[Tensor, " R"],
    means: Float[Tensor, "R H"],
    betas: tuple[float, float],
    seed: int,
) -> None:
    """Moves both moments of these rows towards their mean gradient and its square, in place. A table in
    bfloat16 is rounded at random, which the seed decides: to the nearest, a decay by 0.1 % would never show.
    """
    if kernels := find_kernels(means):
        return kernels.decay(first, second, slots, means, betas, seed)
    generator = torch.Generator(means.device).manual_seed(seed)
    size = max(1, _BLOCK_ELEMENTS // max(1, means.shape[1]))
    for places, mean in zip(slots.split(size), means.split(size), strict=True):
        for table, beta, value in ((first, betas[0], mean), (second, betas[1], mean.square())):
            new = table[places].to(mean.dtype) * beta + value * (1 - beta)
            table[places] = new if table.dtype == new.dtype else _round(new, generator)


def _round(values: Tensor, generator: torch.Generator) -> Tensor:
    """Returns bfloat16, up or down in proportion to the nearness: right in the mean."""
    bits = values.float().view(torch.int32)
    noise = torch.randint(2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(2**16)).view(torch.float32).bfloat16()
