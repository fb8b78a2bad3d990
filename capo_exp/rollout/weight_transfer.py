"""The learner's end of a weight transfer: its parameters -> a vLLM engine, through vLLM's own interface.

CUDA memory goes by vLLM's senders, `ipc` where learner and engine share a GPU and `nccl` where they do not;
anything else as safetensors bytes (vllm_plugin.py is the other end). No file is written.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.config.errors import ConfigError
from capo_exp.distributed.sharding import full, is_sharded
from capo_exp.rollout import EngineFailed
from capo_exp.rollout.vllm_process import Engine

CHUNK_BYTES = 64 * 2**20
POLL_SECONDS = 0.1


class WeightClient:
    """The engine's side of the conversation: vLLM's VLLMWeightSyncClient.

    It remembers how the engine failed: vLLM's senders call it from a thread, and wait for the GPU.
    """

    def __init__(self, running: Callable[[], Engine]) -> None:
        """Takes what returns the engine, at times an Enduring."""
        self._running = running
        self._failure: EngineFailed | None = None

    @property
    def failure(self) -> EngineFailed | None:
        """What the engine has failed with: raised, or kept."""
        return self._failure or getattr(self._running(), "failure", None)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self._ask("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._ask("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("finish_weight_update", weight_version=weight_version)

    def _ask(self, method: str, **arguments: Any) -> None:
        try:
            self._running().call(method, **arguments)
        except EngineFailed as error:
            self._failure = error
            raise


@dataclass(frozen=True)
class EngineWeights:
    """A model's weights, each time as they are then, as an engine takes them: whole, where they are sharded,
    and in its dtype, else vLLM's log holds a warning for each."""

    model: PreTrainedModel
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight under every name it has: of a tied last layer vLLM's CPU build keeps a packed
        copy, which would go stale if it were sent as the embedding alone."""
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            yield name, full(parameter.detach().to(self.dtype))


def choose_backend(wanted: str, device: torch.device, *, shares_memory: bool, other_gpu: bool) -> str:
    """Returns the way that weights travel: the one that is wanted, or for `auto` the best.

    Args:
        wanted: auto, ipc, nccl or safetensors.
        device: the learner's.
        shares_memory: whether the engine is a process of this run on the same device.
        other_gpu: whether the engine has a GPU of its own.

    Raises:
        ConfigError: for a backend that cannot work between the two.
    """
    best = "ipc" if shares_memory else "nccl" if other_gpu else "safetensors"
    possible = ["safetensors"] if device.type == "cpu" else list(dict.fromkeys([best, "safetensors"]))
    if wanted != "auto" and wanted not in possible:
        expected = f"{' or '.join(['auto', *possible])} between this learner and this engine"
        raise ConfigError(f"rollout.engine.weight_transfer={wanted}: expected {expected}")
    return possible[0] if wanted == "auto" else wanted


def make_sender(
    backend: str,
    client: WeightClient,
    weights: EngineWeights,
    *,
    address: str,
    world_size: int,
    rank: int,
    seconds: float,
) -> Callable[[], None]:
    """Makes a function that sends all weights as they are when it is called.

    Args:
        backend: safetensors, ipc or nccl.
        client: the engine's, which takes them.
        weights: the learner's.
        address: nccl only: this machine's name or address for the engine's workers.
        world_size: nccl only: number of the engine's workers.
        rank: ipc and nccl only: which of the processes that share the engine this is; the first one sends.
        seconds: ipc and nccl only: limit of the handshake and of each transfer, whatever the client's are.
    """
    if backend == "safetensors":
        client.init_weight_transfer_engine({})
        return lambda: _send_safetensors(client, weights)
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    if backend == "ipc":
        info = describe_ipc(weights, rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        info = NCCLTrainerInitInfo(address, get_open_port(), 1 + world_size, rank=rank)

    def join() -> Any:
        theirs: Any = client
        source = make_weight_source(weights)
        return WeightTransferTrainerFactory.trainer_init(info, client=theirs, source=source)

    def limited(what: str, action: Callable[[], Any]) -> Any:
        def on_its_gpu() -> Any:
            with torch.cuda.device(weights.model.device):  # a new thread's is the first
                torch.cuda.synchronize()  # vLLM copies on streams of its own: the update has to be done
                return action()

        # Another backend's sender ends by itself, and must not be left while other processes gather with it.
        failed = (lambda: client.failure) if backend == "nccl" else (lambda: None)
        return run_within(seconds, what, on_its_gpu, failed=failed)

    sender = limited(f"joining the engine for {backend} transfers", join)
    return lambda: limited(f"sending weights by {backend}", sender.send_weights)


def describe_ipc(weights: EngineWeights, rank: int = 0) -> Any:
    """Describes transfers to vLLM: in place, where a copy in another dtype stays until all are sent; or of a
    sharded model, whose gathered tensors would all stay, packed into one buffer that the largest fits.

    Each process exports memory of its own GPU. The engine's first one, rank 0, tells it of all exports of all
    processes, of which each worker takes that of its GPU."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    info = IPCTrainerInitInfo(rank=rank, packed=is_sharded(weights.model))
    largest = weights.dtype.itemsize * max(weight.numel() for weight in weights.model.parameters())
    info.packed_buffer_size_bytes = max(info.packed_buffer_size_bytes, largest)
    return info


def make_weight_source(weights: EngineWeights) -> Any:
    """Makes a WeightSource, from which vLLM's senders read all weights."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class AllWeights(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            every = weights.model.named_parameters(remove_duplicate=False)  # nothing is gathered for it
            return [ParamMeta(name, weights.dtype, tuple(weight.shape)) for name, weight in every]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights)

    return AllWeights()


def run_within(
    seconds: float,
    what: str,
    action: Callable[[], Any],
    *,
    failed: Callable[[], EngineFailed | None] = lambda: None,
) -> Any:
    """Runs what cannot be interrupted, such as a collective, where it can be left behind.

    Args:
        seconds: limit.
        what: names the action in the message.
        action: its result is returned.
        failed: says now and then whether waiting is in vain.

    Raises:
        EngineFailed: if the action fails, `failed` says so, or after `seconds`. The thread may hang for ever;
            it ends with the process.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + seconds
    while not outcome.done() and time.monotonic() < deadline and not failed():
        wait([outcome], timeout=POLL_SECONDS)
    if lost := failed():
        raise lost
    if not outcome.done():
        raise EngineFailed(f"vLLM: {what}: no answer within rollout.engine.transfer_seconds={seconds:g}")
    error = outcome.exception()
    if error is not None and not isinstance(error, EngineFailed):
        raise EngineFailed(f"vLLM: {what}: {type(error).__name__}: {error}") from error
    return outcome.result()


def _send_safetensors(client: WeightClient, weights: EngineWeights) -> None:
    """Sends whole tensors, about CHUNK_BYTES at a time."""
    client.start_weight_update()
    chunk: dict[str, Tensor] = {}
    for name, tensor in weights:
        chunk[name] = tensor.cpu().clone()  # safetensors refuses tensors that share memory
        if sum(t.nbytes for t in chunk.values()) >= CHUNK_BYTES:
            client.update_weights({"data": save(chunk)})
            chunk = {}
    if chunk:
        client.update_weights({"data": save(chunk)})
    client.finish_weight_update()
