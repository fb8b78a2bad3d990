"""What vLLM itself runs of ours: a weight-transfer backend for engines without a GPU.

vLLM's own backends (ipc, nccl) move CUDA memory. This one takes weights as safetensors bytes, in process or
over HTTP, and hands them to the same layer-wise loader. It is found through the entry point in
pyproject.toml, so that a `vllm serve` beside an installed capo_exp knows it too.
"""

import base64
from dataclasses import dataclass
from functools import cache
from typing import Any

from safetensors.torch import load
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "safetensors"


@dataclass
class SafetensorsInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class SafetensorsUpdateInfo(WeightTransferUpdateInfo):
    """Some of the weights, by their names in the checkpoint."""

    data: bytes | str
    """safetensors bytes; base64 where they came over HTTP."""


class SafetensorsWeightTransferEngine(WeightTransferEngine[SafetensorsInitInfo, SafetensorsUpdateInfo]):
    """The receiving end, in each of vLLM's workers."""

    init_info_cls = SafetensorsInitInfo
    update_info_cls = SafetensorsUpdateInfo

    def init_transfer_engine(self, init_info: SafetensorsInitInfo) -> None:
        del init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Leaves out the base class's synchronisation of an accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SafetensorsUpdateInfo) -> None:
        data = update_info.data
        tensors = load(base64.b64decode(data) if isinstance(data, str) else data)
        self.model.load_weights(iter(tensors.items()))  # pyright: ignore[reportCallIssue]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


@cache
def register() -> None:
    """Makes the backend known; vLLM calls this in each of its processes, possibly more than once."""
    WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsWeightTransferEngine)
