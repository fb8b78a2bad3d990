"""The processes of a run, as a value that is passed in: which one this is, and how they agree. Imports no
torch until there are several."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from traceback import format_exception_only
from typing import TYPE_CHECKING, TypeVar

from capo_exp.config.errors import error
from capo_exp.config.schema import DistributedConfig, RolloutConfig, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")

FOLDER = "CAPO_EXP_WORLD"
"""Environment variable: a folder that the processes of a node share with whoever launched them; see
sweep/launch.py."""
STOP = "stop"
"""File in that folder: somebody wants the run to end after its step."""


@dataclass(frozen=True)
class World:
    """One of `size` processes that run the same program; all of them have to make the same calls."""

    rank: int  # From 0; the first writes the files
    size: int
    block: int = 1  # So many consecutive ones share an engine that samples

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this process owns its block's engine."""
        return self.rank % self.block == 0

    @property
    def blocks(self) -> "World":
        """The blocks, as if each were one process, and which of them this process is in."""
        return replace(self, rank=self.rank // self.block, size=self.size // self.block, block=1)

    def deal(self, items: Sequence[Value]) -> list[Value]:
        """Returns this process's share: item i goes to rank i mod size."""
        return list(items[self.rank :: self.size])

    def collect(self, shares: Sequence[Sequence[Value]]) -> list[Value]:
        """Undoes `deal`: the shares of all ranks -> the items in their order."""
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def sum(self, values: "Tensor") -> "Tensor":
        """Adds up over the processes; every one gets the same bits."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        total = values.clone()
        dist.all_reduce(total)
        return total

    def together(self, action: Callable[[], Value]) -> list[Value]:
        """Does what can fail in one process alone, and returns the results of all, by rank; tensors in them
        have to be on the CPU.

        Raises:
            Exception: in every process, that of the first rank whose action failed.
        """
        if self.size == 1:
            return [action()]
        import torch.distributed as dist

        own, failure = None, None
        try:
            own = action()
        except Exception as error:
            failure = error
        said: list[tuple[Value, Exception | None]] = [(own, failure)] * self.size  # pyright: ignore[reportAssignmentType]
        dist.all_gather_object(said, (own, failure and _portable(failure)))
        for rank, (_, error) in enumerate(said):
            if error is not None:
                raise failure if rank == self.rank and failure is not None else error
        return [result for result, _ in said]

    def first(self, action: Callable[[], Value]) -> Value:
        """Does something in the first process alone, and gives everyone the result, or the error."""
        shares = self.together(lambda: action() if self.is_first else None)
        return shares[0]  # pyright: ignore[reportReturnType]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the processes."""
        return any(self.together(lambda: flag))


def _portable(failure: Exception) -> Exception:
    """Returns an exception that other processes can rebuild, which pickle does from its args alone."""
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        return RuntimeError("".join(format_exception_only(failure)).strip())
    return failure


SINGLE = World(0, 1)
"""The world of a run with one process, in which all of this does nothing."""


@contextmanager
def open_world(config: TrainConfig, device: "torch.device") -> Iterator[World]:
    """Joins the processes that torchrun started; the world of one process needs no torchrun."""
    if config.distributed.name == "single":
        yield SINGLE
        return
    import torch.distributed as dist

    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.distributed.timeout_seconds))
    size = dist.get_world_size()
    yield World(dist.get_rank(), size, count_sharing(config.rollout, size))
    dist.destroy_process_group()  # not after an error: the others may wait in a collective


def count_sharing(rollout: RolloutConfig, size: int) -> int:
    """Returns how many of the processes share an engine: all of them a server elsewhere."""
    return size if rollout.server_url else rollout.engine.get("tensor_parallel_size", 1)


def is_worker() -> bool:
    """Returns whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_size(config: DistributedConfig) -> DistributedConfig:
    """Returns the settings with the numbers of the torchrun that started this process, whatever they say.

    Raises:
        ConfigError: it started several, of which each would train the whole run.
    """
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if config.name == "single" and size > 1:
        raise error("distributed", config.name, f"fsdp2 under torchrun, which started {size} processes")
    return replace(config, processes=local, nodes=size // local)


def own_device(config: DistributedConfig, device: "torch.device") -> "torch.device":
    """Returns the process's own GPU where the learner computes on GPUs: of several processes that of its
    number on the node. It becomes torch's current one, which is what a stopwatch waits for."""
    if device.type == "cpu":
        return device
    import torch

    own = device if config.name == "single" else torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    if own.index is not None:
        torch.cuda.set_device(own)
    return own


def stop_asked() -> bool:
    """Returns whether whoever launched this process wants the run to end after its step."""
    folder = os.environ.get(FOLDER)
    return folder is not None and Path(folder, STOP).exists()
