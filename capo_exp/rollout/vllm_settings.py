"""The settings of rollout=vllm, each with its range. Imports no torch, so that they are checked at once."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from capo_exp.config.places import resolve_model_path
from capo_exp.config.ranges import ABOVE_0_TO_1, AT_LEAST_0, AT_LEAST_1, POSITIVE, Rule, not_empty, one_of
from capo_exp.distributed.world import SINGLE, World

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from capo_exp.rollout.vllm import VLLMRollout

DTYPES = ("float32", "bfloat16", "float16")


GIB_OR_NULL = POSITIVE._replace(expected="null or a positive number")
GPUS = Rule(
    lambda v: re.fullmatch(r"[\w-]+(,[\w-]+)*", str(v)) is not None,
    "null, or GPUs as CUDA_VISIBLE_DEVICES names them",
)
MODEL_PATH = not_empty("a directory or a hub id")
EACH_DTYPE = Rule(lambda v: set(v) >= set(DTYPES), f"a positive number for each of {', '.join(DTYPES)}")
SLEEP_LEVEL = Rule(lambda v: v in (0, 1, 2), "0, 1 or 2")
NO_RESULT: Any = {"result": False}
"""Marks a setting that changes a run's numbers by rounding at most, hence not its identity: a run whose
engine failed for want of time or memory goes on with more of it."""


@dataclass(frozen=True, kw_only=True)
class VLLMSettings:
    """What `rollout.engine` holds; called with the learner's model it makes the engine, which runs nothing
    until it is started."""

    model_path: Annotated[str, MODEL_PATH]
    """Gives the architecture; the weights are the learner's."""
    revision: str | None
    """Of model_path on the hub."""
    server_url: str | None = field(metadata=NO_RESULT)
    """null = an engine process of this run; start = a server of it; else a server's URL."""
    visible_devices: Annotated[str | int | None, GPUS] = field(metadata=NO_RESULT)
    """CUDA_VISIBLE_DEVICES of an engine of this run; null = the learner's GPU."""
    dtype: Annotated[str, one_of("auto", *DTYPES)]
    """auto = as the learner computes."""
    max_model_len: Annotated[int, AT_LEAST_1]
    """Longest prompt and completion together, in tokens."""
    max_num_seqs: Annotated[int, AT_LEAST_1] = field(metadata=NO_RESULT)
    """Completions sampled at the same time."""
    gpu_memory_utilization: Annotated[float, ABOVE_0_TO_1] = field(metadata=NO_RESULT)
    """Share of the GPU's memory that the engine may take."""
    kv_cache_gib: Annotated[float | None, GIB_OR_NULL] = field(metadata=NO_RESULT)
    """Size of the KV cache; null = what that share leaves, on a CPU 1."""
    tensor_parallel_size: Annotated[int, AT_LEAST_1] = field(metadata=NO_RESULT)
    """GPUs of the engine; with distributed=fsdp2 those of as many processes, which share it."""
    enforce_eager: bool
    """No CUDA graphs: a faster start, slower sampling."""
    sleep_level: Annotated[int, SLEEP_LEVEL] = field(metadata=NO_RESULT)
    """Between rollouts the engine keeps (0) its GPU memory, (1) its weights in CPU memory, (2) nothing."""
    top_k: Annotated[int, AT_LEAST_0]
    """Of training rollouts; 0 = off."""
    top_p: Annotated[float, ABOVE_0_TO_1]
    """Of training rollouts; 1 = off. Where top_k or top_p cuts, vLLM renormalises processed log-probs over
    what is left; the learner's are not, so raw ones are asked for (at temperature 1: config/checks.py)."""
    weight_transfer: Annotated[str, one_of("auto", "ipc", "nccl", "safetensors")] = field(metadata=NO_RESULT)
    weight_transfer_address: str = field(metadata=NO_RESULT)
    """nccl only: this machine's name or address for the engine's workers."""
    start_seconds: Annotated[float, POSITIVE] = field(metadata=NO_RESULT)
    generate_seconds: Annotated[float, POSITIVE] = field(metadata=NO_RESULT)
    transfer_seconds: Annotated[float, POSITIVE] = field(metadata=NO_RESULT)
    """Limits of the start, of one call that samples, and of each step of a weight transfer."""
    max_probe_difference: Annotated[dict[str, Annotated[float, POSITIVE]], EACH_DTYPE] = field(
        metadata=NO_RESULT
    )
    """dtype -> mean difference [nats] of a probe's log-probs above which weights count as stale."""

    def __call__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        compute_dtype: "torch.dtype",
        world: World = SINGLE,
    ) -> "VLLMRollout":
        """Returns an engine with these settings for the learner's model, tokenizer, dtype and processes."""
        from capo_exp.rollout.vllm import VLLMRollout

        return VLLMRollout(model, tokenizer, compute_dtype, self, world)

    @property
    def is_remote(self) -> bool:
        """Whether a server is used that the run does not own."""
        return self.server_url not in (None, "start")

    def engine_arguments(self, *, dtype: str, backend: str, on_cpu: bool) -> dict[str, Any]:
        """Returns the arguments of vLLM's LLM, for a dtype and a way of weight transfer that are chosen."""
        kv_cache_gib = 1 if self.kv_cache_gib is None and on_cpu else self.kv_cache_gib
        cuts = self.top_k > 0 or self.top_p < 1
        arguments: dict[str, Any] = {
            "model": resolve_model_path(self.model_path),
            "revision": self.revision,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager,
            "enable_sleep_mode": self.sleep_level > 0,
            "logprobs_mode": "raw_logprobs" if cuts else "processed_logprobs",
            "weight_transfer_config": {"backend": backend},
        }
        if on_cpu:
            # After part of a prefill vLLM 0.32 rewinds the request's generator, which torch cannot on a CPU.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(4096, self.max_model_len)
        return arguments
