"""Masked reductions: the only ones in the repository, so that padding can never leak into a number.

A mask is bool and has the shape of the values. An empty mask gives 0, never NaN.
"""

from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over True positions; a masked-out NaN or infinity does not count."""
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over True positions."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest value at a True position."""
    kept = values[mask]
    return kept.max() if kept.numel() else values.new_zeros(())


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """The smallest value at a True position that at least a share q of them do not exceed (no
    interpolation)."""
    kept = values[mask]
    if not kept.numel():
        return values.new_zeros(())
    rank = max(1, min(kept.numel(), ceil(round(q * kept.numel(), 9))))
    return kept.kthvalue(rank).values


def masked_top(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """The `count` True positions with the largest values, as a mask; the first ones of equals."""
    ranked = values.masked_fill(~mask, -torch.inf).flatten().argsort(descending=True, stable=True)
    top = torch.zeros_like(mask)
    top.view(-1)[ranked[:count]] = True
    return top & mask


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Share of the True positions of `whole` that are True in `part`; float32."""
    return masked_mean(part.float(), whole)


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Places packed rows [N, ...] at the True positions of mask [B, T]; 0 elsewhere. Differentiable."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.masked_scatter(mask.view(*mask.shape, *[1] * (values.dim() - 1)), values)


def whiten(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """(values - mean) / sqrt(variance + eps) over True positions, 0 elsewhere; exactly 0 where all are
    equal, whatever the rounding."""
    centred = values - masked_mean(values, mask)
    variance = masked_mean(centred.square(), mask)
    kept = values[mask]
    varies = (kept != kept[:1]).any()
    return centred / (variance + eps).sqrt() * mask * varies


def centre(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """R - mean of its row, [P, G] -> [P, G]; exactly 0 where all rewards of a row are equal, whatever the
    rounding."""
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0.0)
