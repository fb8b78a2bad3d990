"""What a function that the configuration names has returned, against what its kind promises."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from capo_exp.config.errors import RunFailed
from capo_exp.core.types import Selection, TokenLoss

Part = Callable[..., Any]
Kind = TypeVar("Kind")


class WrongReturn(RunFailed):
    """A part returned something else than its kind does. The message names its key and the function."""


def as_kind(got: object, kind: type[Kind], key: str, part: Part) -> Kind:
    """Returns what a part returned, if it is of the kind, else raises WrongReturn."""
    if not isinstance(got, kind):
        raise _wrong(key, part, got, f"a {kind.__name__}")
    return got


def as_tensor(
    got: object, axes: str, shape: Sequence[int], key: str, part: Part, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns a tensor that a part returned, of this shape, whose axes have names such as `B T`, and of the
    dtype, else raises WrongReturn."""
    if not isinstance(got, Tensor) or got.shape != tuple(shape) or dtype not in (None, got.dtype):
        kind = "a tensor" if dtype is None else f"a tensor of {str(dtype).removeprefix('torch.')}"
        wanted = f" [{axes.replace(' ', ', ')}] = {list(shape)}" if axes else ", a scalar"
        raise _wrong(key, part, got, f"{kind}{wanted}")
    return got


def as_selection(got: object, mask: Tensor, key: str, part: Part) -> Selection:
    """Returns a selection of tokens at the True positions of mask [B, T], else raises WrongReturn."""
    selection = as_kind(got, Selection, key, part)
    keep = as_tensor(selection.keep_mask, "B T", mask.shape, f"{key}: keep_mask", part, dtype=torch.bool)
    if selection.weights is not None:
        as_tensor(selection.weights, "B T", mask.shape, f"{key}: weights", part)
    return replace(selection, keep_mask=keep & mask)


def as_token_loss(got: object, mask: Tensor, key: str, part: Part) -> TokenLoss:
    """Returns the losses of tokens [B, T], which carry a gradient, else raises WrongReturn."""
    loss = as_kind(got, TokenLoss, key, part)
    values = as_tensor(loss.values, "B T", mask.shape, f"{key}: values", part)
    as_tensor(loss.clipped, "B T", mask.shape, f"{key}: clipped", part, dtype=torch.bool)
    if not values.requires_grad:
        raise _wrong(f"{key}: values", part, values, "them to be computed from the log_probs it is given")
    return loss


def check_any(got: Tensor, key: str, part: Part) -> None:
    """Raises WrongReturn where a part left nothing."""
    if not got.any():
        raise _wrong(key, part, got, "at least one True", but="all of it False")


def check_finite(got: Tensor, key: str, part: Part, *given: Tensor) -> None:
    """Raises WrongReturn where a part made numbers that are not finite of such that all are."""
    if not got.isfinite().all() and all(values.isfinite().all() for values in given):
        raise _wrong(key, part, got, "finite numbers, as all were that it was given", but="not all finite")


def _wrong(key: str, part: Part, got: object, wanted: str, *, but: str = "") -> WrongReturn:
    while isinstance(part, partial):
        part = part.func
    name = f"{part.__module__}.{getattr(part, '__qualname__', type(part).__name__)}"
    said = type(got).__name__
    if isinstance(got, Tensor):
        said = f"a tensor of {str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
    return WrongReturn(f"{key}: {name} returned {f'{said}, {but}' if but else said}; expected {wanted}")
