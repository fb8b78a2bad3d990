"""The memory estimate as lines of the plan."""

from pathlib import Path

from capo_exp.config.memory import Memory, estimate, precision
from capo_exp.config.schema import TrainConfig


def describe(config: TrainConfig) -> list[str]:
    """What this command would take here, its parts, and what GPUs would hold."""
    reference, here = config.algo.needs_reference, _on_gpu(config)
    memory, gpu = (estimate(config, reference=reference, gpu=where) for where in (here, True))
    phase = max(memory.phases, key=memory.phases.__getitem__)
    shards = ", ".join(human(gpu.per_gpu(count).total) for count in (2, 4, 8))
    return [
        f"{memory.num_parameters:,} parameters; estimated peak of tensors {human(memory.total)} on a "
        f"{'GPU' if here else 'CPU'} in {precision(config, gpu=here)}, fullest in the {phase} phase",
        f"not all at once: {_parts(memory)}",
        f"on one GPU in {precision(config, gpu=True)} {human(gpu.total)}; this build trains on one device, "
        f"full sharding over 2, 4, 8 would take {shards} each",
        *_engine(config, memory.num_parameters, gpu=here),
    ]


def human(size: int) -> str:
    """Bytes in decimal units: 1234567 -> 1.2 MB."""
    number, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{number:.{1 if number < 10 else 0}f} {unit}"


def _engine(config: TrainConfig, parameters: int, *, gpu: bool) -> list[str]:
    """What vLLM takes beside the learner."""
    if not config.rollout.is_vllm:
        return []
    numbers, url = config.rollout.engine, config.rollout.server_url
    if url is not None and url != "start":
        return [f"vLLM at {url}"]
    width = 4 if precision(config, gpu=gpu) == "float32" else 2
    kv_cache = numbers["kv_cache_gib"] or (None if gpu else 1)
    cache = (
        f"{kv_cache:g} GiB"
        if kv_cache
        else f"up to {numbers['gpu_memory_utilization']:.0%} of its GPU in all"
    )
    return [f"vLLM beside it, in a process of its own: weights {human(width * parameters)}, KV cache {cache}"]


def _parts(memory: Memory) -> str:
    parts = {
        "weights": memory.parameters,
        "gradients": memory.gradients,
        "Adam": memory.optimizer,
        "reference": memory.reference,
        "curvature moments": memory.moments,
        "activations": memory.activations + memory.layer,
        "logits": memory.logits,
        "records": memory.records,
        "KV cache": memory.kv_cache,
    }
    return ", ".join(f"{name} {human(size)}" for name, size in parts.items() if size)


def _on_gpu(config: TrainConfig) -> bool:
    """Whether this command would use a GPU, as far as can be told without torch."""
    return config.device.startswith("cuda") or (config.device == "auto" and Path("/dev/nvidia0").exists())
