"""A model whose weights, gradients and moments are shared out over the processes: torch's FSDP2.

Each decoder layer is a unit, and the embedding, the last norm and the last layer are the root's, whose
forward pass is the method SCORE. A sharded tensor is a DTensor; a plain one passes these functions as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.distributed.world import World

SCORE = "score_tokens"
"""Method of a sharded model: the body of every forward pass. What goes past it would read shards."""


def shard(model: PreTrainedModel, world: World, *, gather: str, body: Callable[..., Any]) -> None:
    """Shares the model's weights out, in place.

    Args:
        model: the same in every process.
        world: all of which call this.
        gather: float32, or bfloat16, in which layers then compute; gradients are added up in float32.
        body: (model, ...) -> tuple of tensors, to be called through the model's method SCORE.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(model.device.type, (world.size,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    precision = half if gather == "bfloat16" else MixedPrecisionPolicy()
    for unit in (*decoder_layers(model), model):  # else a pass without gradients leaves the root whole
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the parts of the loss add up; torch's default is their mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, SCORE, MethodType(body, model))
    register_fsdp_forward_method(model, SCORE)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Returns the layers between the embedding and the last norm."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(model: PreTrainedModel) -> bool:
    """Returns whether `shard` has shared the model out."""
    return SCORE in vars(model)


def full(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


@torch.no_grad()
def copy_weights(model: PreTrainedModel, replica: PreTrainedModel) -> None:
    """Gives a plain copy of a sharded model its weights as they are now."""
    for source, target in zip(model.parameters(), replica.parameters(), strict=True):
        target.copy_(full(source))


@torch.no_grad()
def whole_state(model: PreTrainedModel, world: World) -> dict[str, Tensor]:
    """Returns the state dict of whole tensors on the CPU in the first process, an empty one in the others;
    tied weights are one tensor, as in the model."""
    known: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known[id(tensor)] = whole = full(tensor.detach())
            known[id(tensor)] = whole.cpu() if world.is_first else whole.new_empty(0)
        state[name] = known[id(tensor)]
    return state if world.is_first else {}


def take_shards(optimizer: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Splits an optimiser's state dict into what every process has, and the sharded moments, each as
    `PARAMETER.NAME`."""
    shards: dict[str, Tensor] = {}
    plain: dict[int, dict[str, Any]] = {}
    for number, moments in optimizer["state"].items():
        sharded = {name: value for name, value in moments.items() if hasattr(value, "to_local")}
        shards |= {f"{number}.{name}": value for name, value in sharded.items()}
        plain[number] = {name: value for name, value in moments.items() if name not in sharded}
    return {**optimizer, "state": plain}, shards


def save_shards(shards: dict[str, Tensor], folder: Path) -> None:
    """Writes each process's part, by torch.distributed.checkpoint, as safetensors: its own format reads a
    pickle, which may be a program."""
    with _checkpoint_library() as dcp:
        dcp.save(shards, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def place_moments(optimizer: dict[str, Any], model: PreTrainedModel, folder: Path | None) -> None:
    """Lays the moments in an optimiser's state dict out as the model's parameters are here, however many
    processes wrote them: those of a folder of `save_shards`, or the whole ones that stand there."""
    parameters = list(model.parameters())
    if folder is not None:
        _load_shards(optimizer, parameters, folder)
        return
    for number, moments in optimizer["state"].items():
        for name, value in moments.items():
            moments[name] = _place(value, parameters[number])


@contextmanager
def _checkpoint_library() -> Iterator[Any]:
    """Gives torch.distributed.checkpoint, and raises what a process failed with in place of its
    CheckpointException, which is no Exception."""
    from torch.distributed import checkpoint

    try:
        yield checkpoint
    except checkpoint.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _load_shards(optimizer: dict[str, Any], parameters: list[torch.nn.Parameter], folder: Path) -> None:
    with _checkpoint_library() as dcp:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        keys = [key.partition(".") for key in reader.read_metadata().state_dict_metadata]
        found = {f"{n}.{name}": torch.zeros_like(parameters[int(n)]).detach() for n, _, name in keys}
        dcp.load(found, storage_reader=reader, no_dist=not hasattr(parameters[0], "device_mesh"))
    for n, _, name in keys:
        optimizer["state"][int(n)][name] = found[f"{n}.{name}"]


def _place(value: Any, like: Tensor) -> Any:
    """Shards a whole tensor as a parameter is; a step count stays."""
    if not hasattr(like, "device_mesh") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
