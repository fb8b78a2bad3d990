"""What a run will do and take, in a few lines."""

from capo_exp.config.architecture import NEEDS
from capo_exp.config.errors import ConfigError
from capo_exp.config.memory import KINDS, engine_weights, estimate_memory, find_device, human
from capo_exp.config.schema import TrainConfig

NAMES = {"kv_cache": "KV cache", "adam": "Adam"}
WIDTH = 80


def plan(config: TrainConfig) -> list[str]:
    """Returns the batch arithmetic of a run and the memory it takes, in five lines of 80 characters."""
    regime, algo, steps = config.regime, config.algo, config.num_steps
    batch = regime.prompts_per_step * regime.group_size
    micro, tokens = min(config.model.micro_batch_size, batch), config.model.max_tokens_per_micro_batch
    cuts = f"{_count(batch // micro, 'micro-batch', 'es')} of {micro}"
    if tokens is not None:
        cuts = f"micro-batches of {tokens:,} tokens"
    updates = steps * algo.num_iterations * algo.num_minibatches
    iterations = _count(algo.num_iterations, "iteration")
    if algo.num_minibatches > 1:
        iterations += f" x {algo.num_minibatches:,} minibatches"
    rounds = -(-steps // (config.evaluation.every or steps))  # and one before the first step
    evaluations = _count(1 + rounds, "evaluation")
    problems = config.evaluation.num_problems * config.evaluation.samples
    sampled, most = f"{batch * steps:,} completions", ""
    if algo.rollout_tokens is not None:
        sampled, most = f"{algo.rollout_tokens * steps:,} tokens in completions", "at most "
    return [
        f"{algo.full_name} on {config.dataset.name} with {config.model.name}, {regime.name}, "
        f"seed {config.seed}",
        f"{regime.prompts_per_step} prompts x {regime.group_size} = {most}{batch:,} completions a step"
        f" = {cuts}",
        f"{_count(steps, 'step')} x {iterations} = {_count(updates, 'optimiser step')}"
        f", lr {regime.learning_rate:g}",
        f"{sampled} of at most {config.dataset.max_completion_tokens:,} tokens;"
        f" {evaluations} of {problems:,}",
        _memory(config),
    ]


def _count(number: int, unit: str, plural: str = "s") -> str:
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}{plural}"


def _memory(config: TrainConfig) -> str:
    """Returns the learner's memory with vLLM's, or with its largest parts as far as the line has room for
    them; or why it is not known."""
    try:
        shape = config.model.architecture
    except ConfigError:  # which says more, to a run
        return f"memory: config.json cannot be read; needs {NEEDS}"
    device = find_device(config.device)
    memory = estimate_memory(config, gpu=device != "cpu")
    kind = "" if shape.model_type in KINDS else f" ({shape.model_type} counted as {KINDS[0]})"
    shared = config.distributed
    where = device if shared.name == "single" else f"each of {shared.world_size} processes ({device})"
    total = f"about {human(memory.total)} on {where}{kind}"
    engine, url = config.rollout.engine, config.rollout.server_url
    if not config.rollout.is_vllm:
        largest = sorted(vars(memory).items(), key=lambda part: -part[1])
        parts = [f"{NAMES.get(name, name)} {human(size)}" for name, size in largest]
        lines = [f"{total}; the most: {', '.join(parts[:count])}" for count in (3, 2, 1)]
        return next((line for line in lines if len(line) <= WIDTH), lines[-1])
    if url not in (None, "start"):
        return f"{total}; vLLM at {url}"
    cache = f"KV cache {engine['kv_cache_gib'] or 1:g} GiB"
    if engine["kv_cache_gib"] is None and device != "cpu":
        cache = f"up to {engine['gpu_memory_utilization']:.0%} of its GPU"
    return f"{total}; vLLM: weights of at most {human(engine_weights(config))}, {cache}"
