"""The learner's end of a weight transfer: its parameters -> a vLLM engine, through vLLM's own interface.

CUDA memory goes by vLLM's senders, `ipc` where learner and engine share a GPU and `nccl` where they do not;
anything else as safetensors bytes (vllm_plugin.py is the other end). No file is written.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.config import ConfigError
from capo_exp.rollout import EngineFailed

CHUNK_BYTES = 64 * 2**20


class WeightClient(Protocol):
    """The engine's side of the conversation: vLLM's VLLMWeightSyncClient."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def choose_backend(wanted: str, device: torch.device, *, same_gpu: bool) -> str:
    """`auto`, resolved.

    Raises:
        ConfigError: for a backend that this device cannot have.
    """
    if wanted == "auto":
        return "safetensors" if device.type == "cpu" else "ipc" if same_gpu else "nccl"
    if wanted != "safetensors" and device.type == "cpu":
        raise ConfigError(
            f"rollout.engine.weight_transfer={wanted}: expected auto or safetensors with the learner on a CPU"
        )
    return wanted


def make_sender(
    backend: str,
    client: WeightClient,
    model: PreTrainedModel,
    *,
    address: str,
    world_size: int,
    seconds: float,
) -> Callable[[], None]:
    """A function that sends all weights as they are when it is called.

    Args:
        backend: safetensors, ipc or nccl.
        client: of the engine that takes them.
        model: whose weights.
        address: nccl only: this machine's name or address for the engine's workers.
        world_size: nccl only: number of the engine's workers.
        seconds: ipc and nccl only: limit of the handshake and of each transfer, whatever the client's are.
    """
    if backend == "safetensors":
        client.init_weight_transfer_engine({})
        return lambda: _send_safetensors(client, model)
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info: Any = IPCTrainerInitInfo(rank=0, packed=True)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        info = NCCLTrainerInitInfo(address, get_open_port(), 1 + world_size, rank=0)

    def join() -> Any:
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=weight_source(model))

    def limited(what: str, action: Callable[[], Any]) -> Any:
        def on_its_gpu() -> Any:
            with torch.cuda.device(model.device):  # a new thread's is the first
                return action()

        return within(seconds, what, on_its_gpu)

    sender = limited(f"joining the engine for {backend} transfers", join)
    return lambda: limited(f"sending weights by {backend}", sender.send_weights)


def weight_source(model: PreTrainedModel) -> Any:
    """All parameters as vLLM's senders read them: a WeightSource."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class AllParameters(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return all_parameters(model)

    return AllParameters()


def all_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight under every name it has: of a tied last layer vLLM's CPU build keeps a packed copy, which
    would go stale if it were sent as the embedding alone."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()


def within(seconds: float, what: str, action: Callable[[], Any]) -> Any:
    """Runs what cannot be interrupted, such as a collective, where it can be left behind.

    Raises:
        EngineFailed: after `seconds`; the thread stays where it hangs, but ends with the process.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise EngineFailed(f"vLLM: {what}: no answer within rollout.engine.transfer_seconds={seconds:g}")
    return results[0]


def _send_safetensors(client: WeightClient, model: PreTrainedModel) -> None:
    client.start_weight_update()
    for chunk in _chunks(all_parameters(model)):
        client.update_weights({"data": save(chunk)})
    client.finish_weight_update()


def _chunks(weights: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Whole tensors, about CHUNK_BYTES at a time."""
    chunk: dict[str, Tensor] = {}
    for name, tensor in weights:
        chunk[name] = tensor.cpu().clone()  # safetensors refuses tensors that share memory
        if sum(t.nbytes for t in chunk.values()) >= CHUNK_BYTES:
            yield chunk
            chunk = {}
    if chunk:
        yield chunk
