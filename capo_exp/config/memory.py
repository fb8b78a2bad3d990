"""How much memory a run takes, estimated from its configuration alone, and whether this machine has it.

Counted are the tensors of decoders of the Llama kind, with prompts and completions as long as allowed. The
process holds more: its libraries, and freed blocks that an allocator keeps.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from capo_exp.config.architecture import Architecture
from capo_exp.config.build import holds_reference
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig

FLOAT, HALF = 4, 2
GPUS = ("nvidia[0-9]*", "kfd", "dxg")
"""Files in /dev: CUDA, ROCm, Windows' Linux."""
"""Bytes of a float32 and a bfloat16."""
KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Values of model_type whose parameters are counted exactly; those of others as if they were of the first."""
LOGITS_COPIES = 5
"""[tokens, V] float32 tensors alive at once where log-probs are differentiated or a token is drawn."""
SHARED = ("weights", "gradients", "adam", "reference", "records")
"""Parts of which each of several processes has its share."""
LOWER = {
    "activations": "lower model.micro_batch_size or set model.gradient_checkpointing=true",
    "logits": "lower model.logits_chunk_tokens",
    "kv_cache": "lower rollout.engine.max_sequences_per_call",
    "records": "lower regime.prompts_per_step or curvature.top_k",
    "engine": "lower rollout.engine.gpu_memory_utilization or kv_cache_gib",
}
"""The largest part -> what helps, if it is not a smaller model."""


@dataclass(frozen=True)
class Memory:
    """Bytes of each part on the learner's device; of several processes, on the device of each."""

    weights: int
    gradients: int
    adam: int
    reference: int
    moments: int
    """Of the optimiser model that predicts shifts; 0 where it has no table of its own."""
    records: int
    """What a step remembers of each token."""
    activations: int
    logits: int
    kv_cache: int
    """Of the sequences that are sampled at once, and their logits; 0 with vLLM."""
    gathered: int = 0
    """Of sharded weights: the largest units whole, and the copy that transformers samples with."""

    @property
    def total(self) -> int:
        """Adds up what is there at once: nothing is differentiated while completions are sampled."""
        differentiating, sampling = self.activations + self.logits, self.kv_cache
        return sum(vars(self).values()) - min(differentiating, sampling)


def estimate_memory(config: TrainConfig, *, gpu: bool) -> Memory:
    """Estimates the parts; a GPU computes in bfloat16 where model.compute_dtype is auto.

    Raises:
        ConfigError: the model's config.json cannot be read.
    """
    model, dataset, shape = config.model, config.dataset, config.model.architecture
    moment = HALF if config.curvature.moments_dtype == "bfloat16" else FLOAT
    kept = HALF if model.load_dtype == "bfloat16" else FLOAT
    half = model.compute_dtype == "bfloat16" or (model.compute_dtype == "auto" and (gpu or kept == HALF))
    number, width = HALF if half else FLOAT, shape.hidden_size
    batch = config.regime.prompts_per_step * config.regime.group_size
    longest, tokens = dataset.longest_row, model.max_tokens_per_micro_batch
    if set(config.algo.pair_levels) - {"solution"}:  # what a part goes on from stands beside whole solutions
        longest += dataset.max_completion_tokens
    positions = min(tokens or model.micro_batch_size * longest, batch * longest)
    completions = positions if tokens else positions // longest * dataset.max_completion_tokens
    parameters, entries = count_parameters(shape), shape.vocab_size * width
    chunk = min(completions, model.logits_chunk_tokens)
    # Of each token a layer keeps both norms' inputs and normalised inputs in float32, and in compute_dtype
    # the norms' outputs, queries, keys, values, attention's output, four of the MLP and a row of the mask.
    scores = {"sdpa": 0 if model.pack else number, "eager": 2 * FLOAT * shape.num_attention_heads}
    layer = 4 * FLOAT * width + number * (6 * width + 4 * shape.intermediate_size)
    layer += scores.get(model.attn_implementation, 0) * longest
    layers = shape.num_hidden_layers * layer
    if model.gradient_checkpointing:
        layers = shape.num_hidden_layers * FLOAT * width + layer
    # Keys are float32 after the rotation; one layer's keys and values are repeated for every head.
    row = dataset.longest_row  # and what a state or an unfinished completion begins with, beside a new one
    if config.algo.continuations or config.algo.rollout_tokens is not None or config.algo.pair_levels:
        row += dataset.max_completion_tokens
    cached = (FLOAT + number) * (shape.num_hidden_layers * kv_width(shape) + width) * row
    drawing = LOGITS_COPIES * FLOAT * shape.vocab_size
    copies = half and kept == FLOAT and config.distributed.name == "single"  # autocast's
    memory = Memory(
        weights=kept * parameters,
        gradients=kept * parameters,
        adam=(2 * FLOAT + FLOAT - kept) * parameters,  # bfloat16 weights have the rest of their bits there
        reference=kept * parameters if holds_reference(config.algo) else 0,
        moments=2 * moment * entries if config.curvature.optimizer_model == "adam" else 0,
        # The hidden state, and probabilities and ids of the top K.
        records=batch * dataset.max_completion_tokens * FLOAT * (width + 3 * config.curvature.top_k),
        activations=positions * layers + (HALF * parameters if copies else 0),
        logits=LOGITS_COPIES * FLOAT * chunk * shape.vocab_size + kept * entries,
        kv_cache=0 if config.rollout.is_vllm else (cached + drawing) * sequences_at_once(config),
    )
    return memory if config.distributed.name == "single" else _share_out(memory, config)


def _share_out(memory: Memory, config: TrainConfig) -> Memory:
    """Returns what each of several processes holds: its share, the root (embedding and last layer) and two
    layers whole, of which one comes while the other computes, and a whole copy to sample with."""
    size, shape, whole = config.distributed.world_size, config.model.architecture, memory.weights
    shares = {name: vars(memory)[name] // size for name in SHARED}
    root = FLOAT * shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    layers = 2 * (whole - root) // shape.num_hidden_layers
    copy = 0 if config.rollout.is_vllm else whole
    return replace(memory, **shares, gathered=root + layers + copy)


def count_parameters(shape: Architecture) -> int:
    """Counts the embedding, decoder layers, last norm, and the last layer unless it is the embedding; exact
    for the KINDS."""
    width, kv, query = shape.hidden_size, kv_width(shape), shape.num_attention_heads * shape.head_size
    more = {"qwen2": query + 2 * kv, "qwen3": 2 * shape.head_size}  # biases; norms of queries and keys
    layer = width * (2 * query + 2 * kv + 3 * shape.intermediate_size) + 2 * width
    layer += more.get(shape.model_type, 0)
    embeddings = shape.vocab_size * width * (1 if shape.tie_word_embeddings else 2)
    return embeddings + shape.num_hidden_layers * layer + width


def kv_width(shape: Architecture) -> int:
    """Returns how many numbers a token's keys have, and its values as many."""
    return shape.head_size * shape.num_key_value_heads


def sequences_at_once(config: TrainConfig) -> int:
    """Counts the sequences of the largest call: of training, of evaluation, which holds whole groups, or of
    what parts ask for beside a step, as many as an engine takes."""
    batch, samples = config.regime.prompts_per_step * config.regime.group_size, config.evaluation.samples
    rows = batch if config.rollout.chunking == "per_step" else min(batch, config.model.micro_batch_size)
    limit = config.rollout.engine.get("max_sequences_per_call", batch)
    calls = [(rows, config.regime.group_size), (config.evaluation.num_problems * samples, samples)]
    calls += [] if config.algo.rollout_tokens is None else [(rows, 1)]  # what goes on does so one by one
    pairs = (config.rollout.train_engine or {}).get("samples", 0)
    more = (config.algo.continuations, config.algo.reference_samples, pairs)
    calls += [(max(limit, n), n) for n in more if n]
    return max(min(total, max(1, limit // group) * group) for total, group in calls)


def estimate_engine(config: TrainConfig, *, gpu: bool, total: int) -> int:
    """Estimates what vLLM holds while it is awake, on each device of it, which has `total` bytes."""
    engine, url = config.rollout.engine, config.rollout.server_url
    elsewhere = url not in (None, "start") or engine.get("visible_devices") is not None
    if not config.rollout.is_vllm or elsewhere:
        return 0
    if gpu and engine["kv_cache_gib"] is None:
        return int(engine["gpu_memory_utilization"] * total)
    return engine_weights(config) + int(2**30 * (engine["kv_cache_gib"] or 1))


def engine_weights(config: TrainConfig) -> int:
    """Counts the bytes of vLLM's weights on each of its devices, in float32."""
    size: int = config.rollout.engine["tensor_parallel_size"]
    return FLOAT * count_parameters(config.model.architecture) // size


def find_device(name: str) -> str:
    """Resolves `auto`: cpu or cuda, where the learner computes. Imports torch only where a GPU may be."""
    if name != "auto" or not any(path for kind in GPUS for path in Path("/dev").glob(kind)):
        return name.replace("auto", "cpu")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_memory(device: str) -> tuple[int, int]:
    """Returns the free bytes and all bytes: a GPU's, or this machine's or container's. A GPU needs torch."""
    if device.startswith("cuda"):
        import torch

        if (torch.device(device).index or 0) < torch.cuda.device_count():  # else the run says so as it starts
            return torch.cuda.mem_get_info(device)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):  # the file says `max` where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    total = min(limits)
    with suppress(OSError):
        after = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        limits.append(1024 * int(after.split()[0]))
    return min(limits), total


def check_memory(config: TrainConfig, device: str) -> str:
    """Compares the estimate with what is free, and returns both in words.

    Raises:
        ConfigError: The run does not fit; names the keys to lower.
    """
    gpu, (free, total) = device != "cpu", measure_memory(device)
    memory, engine = estimate_memory(config, gpu=gpu), estimate_engine(config, gpu=gpu, total=total)
    if config.rollout.is_vllm and config.rollout.engine["sleep_level"]:  # it wakes where a step has nothing
        engine = max(0, engine - memory.gradients - memory.activations - memory.logits)
    beside = f", engine {human(engine)}" if engine else ""
    processes = config.distributed.processes
    each = f" for each of {processes} processes" if processes > 1 else ""
    seen = f"estimated peak {human(memory.total)}{beside}{each}; free {human(free)} on {device}"
    if (memory.total + engine) * (1 if gpu else processes) > free:
        parts = vars(memory) | {"engine": engine}
        wanted = LOWER.get(max(parts, key=parts.__getitem__), "choose a smaller model=")
        wanted = wanted.replace("model.micro_batch_size", config.model.cut_key)
        raise ConfigError(f"{seen}: {wanted}, or allow_overcommit=true starts it all the same")
    return seen


def human(size: int) -> str:
    """Returns bytes in decimal units: 1234567 -> 1.2 MB."""
    number, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{number:.{1 if number < 10 else 0}f} {unit}"
