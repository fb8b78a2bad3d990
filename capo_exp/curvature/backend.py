"""Which program walks the (token, id) pairs of the last-layer model: torch, or the kernels for a GPU."""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from capo_exp.config.errors import ConfigError, error

_AUTO, _CHOICES = "auto", ("auto", "torch", "triton")
_chosen = _AUTO


def choose_kernel(choice: str, device: torch.device) -> None:
    """Sets curvature.kernel for this process; with auto the environment variable CAPO_KERNEL decides, if it
    is there.

    Raises:
        ConfigError: if the choice cannot run on the device.
    """
    global _chosen
    _chosen = choice
    find_kernels(torch.empty(0, device=device))


def find_kernels(values: Tensor) -> ModuleType | None:
    """Returns the module `kernels` where it computes with such values, None where torch does: with any but
    float32, and under auto without CUDA or Triton.

    Raises:
        ConfigError: if triton is asked for and cannot run where the values are.
    """
    choice = os.environ.get("CAPO_KERNEL", _AUTO) if _chosen == _AUTO else _chosen
    if choice not in _CHOICES:
        raise ConfigError(f"CAPO_KERNEL={choice}: expected one of {', '.join(_CHOICES)}")
    on_gpu = values.is_cuda
    if choice == "torch" or values.dtype != torch.float32 or (choice == _AUTO and not on_gpu):
        return None
    kernels = _load()
    if choice == "triton" and (kernels is None or not (on_gpu or kernels.INTERPRETED)):
        wanted = f"torch or auto: triton needs its package and a CUDA GPU, and this is {values.device}"
        raise error("curvature.kernel", choice, wanted)
    return kernels


@cache
def _load() -> ModuleType | None:
    try:
        return import_module("capo_exp.curvature.kernels")
    except ImportError:
        return None
