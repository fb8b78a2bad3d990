"""How much memory a run takes, from its configuration alone: pure arithmetic, no torch, no weights.

Counts the tensors alive at the fullest moment of each phase of a rollout step, for decoders of the Qwen2 and
Llama kind (RMSNorm, rotary attention, gated MLP). What a layer keeps for the backward pass is read off
transformers' modules; benchmarks/memory.py compares the sums with the peaks of real steps. Prompts and
completions are as long as allowed, so these are upper bounds. Not counted: the interpreter and its libraries,
and freed blocks that an allocator holds back (glibc's, by default, a fifth to nine tenths of the sum).
"""

from dataclasses import dataclass, replace

from capo_exp.config.model_size import count_parameters, embedding, kv_width, layer_matrices, layer_parameters
from capo_exp.config.schema import ModelConfig, TrainConfig

FLOAT, HALF, INT = 4, 2, 8
"""Bytes of a float32, a bfloat16 and an int64."""
LOGITS_COPIES = 5
"""[tokens, V] float32 tensors alive at once in the backward pass of policy._score: the logits, the gradient
of the gather, and three of logsumexp. Drawing a token holds as many: logits, scores, probabilities, noise,
their quotient."""
SUPPORT_BYTES = 52
"""Of a (token, id) pair in curvature.mean_row_gradients: probability, id, logit error and coefficient (20),
row and column of the sparse matrix (16), and the same two stacked (16)."""
RECORD_BYTES = 44
"""Of a token in StepRecord beside hidden and top-K: log-probs, entropy, KL, shifts, credit before and after
its correction, weights, masks."""


@dataclass(frozen=True)
class Memory:
    """Bytes of each part on one device; `phases` says which meet."""

    num_parameters: int
    """A count, not bytes."""
    parameters: int
    gradients: int
    optimizer: int
    reference: int
    moments: int
    """The optimiser model's table once it holds every vocabulary row that the run can reach."""
    accumulated: int
    """Gradients of earlier micro-batches that a micro-batch meets; 0 if it is the only one."""
    activations: int
    """What one micro-batch keeps for its backward pass."""
    layer: int
    """Working memory of a decoder layer on top of that."""
    logits: int
    """Working memory of a chunk of the last layer, before the backward pass reaches the decoder layers."""
    records: int
    """What the optimiser steps of one pass remember of each token."""
    joined: int
    """Those of one optimiser step, there a second time while its micro-batches become one record."""
    curvature: int
    """Working memory of the step's predicted shifts and of the moments update."""
    update: int
    """Working memory of the optimiser step, and of a step rule that looks at it."""
    copies: int
    """bfloat16 weights that autocast keeps while completions are sampled."""
    kv_cache: int
    """Keys, values and logits of one rollout call."""
    kv_cache_of_all: int
    """The same for all completions in one call."""
    unit: int
    """The parameters that full sharding gathers at once: a layer, or the embedding."""

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the fullest moment of each phase."""
        weights = self.parameters + self.optimizer + self.reference + self.moments
        remembering = weights + self.records
        start = self.accumulated + self.activations + max(self.layer, self.logits)
        return {
            "rollout": weights + self.copies + self.kv_cache,
            "backward": remembering + max(start, self.gradients + self.layer),
            "curvature": remembering + self.gradients + max(self.joined, self.curvature),
            "update": remembering + self.gradients + self.update,
        }

    @property
    def total(self) -> int:
        """Bytes at the fullest moment of all."""
        return max(self.phases.values())

    def per_gpu(self, count: int) -> "Memory":
        """What each of `count` GPUs would hold under full sharding (FSDP): its share of all that belongs to
        weights and of the batch's records, but a whole micro-batch, and the parameters gathered at once."""
        if count == 1:
            return self
        shared = (
            "parameters", "gradients", "optimizer", "reference", "moments", "accumulated", "records",
            "joined", "curvature", "update", "copies", "kv_cache_of_all",
        )  # fmt: skip
        parts = {name: -(-getattr(self, name) // count) for name in shared}
        parts["parameters"] += self.unit
        return replace(self, **parts, kv_cache=min(self.kv_cache, parts["kv_cache_of_all"]))


def estimate(config: TrainConfig, *, reference: bool, gpu: bool) -> Memory:
    """The parts on one device.

    Args:
        config: of the run.
        reference: whether a frozen reference model is loaded as well.
        gpu: bfloat16 autocast where compute_dtype is auto, and AdamW over all tensors at once.
    """
    model, algo, half = config.model, config.algo, precision(config, gpu=gpu) == "bfloat16"
    batch = config.regime.prompts_per_step * config.regime.group_size
    step = -(-batch // algo.num_minibatches)
    micro = min(model.micro_batch_size, step)
    weights = FLOAT * count_parameters(model)
    largest_tensor = FLOAT * model.hidden_size * max(model.vocab_size, model.intermediate_size)
    record, curvature = _record(config), _curvature(config, step)
    sequence = 0 if config.rollout.is_vllm else _sequence(config, half)  # vLLM's is not the learner's
    activations, layer = _layers(config, micro, half)
    return Memory(
        num_parameters=count_parameters(model),
        parameters=weights,
        gradients=weights,
        optimizer=2 * weights,
        reference=weights if reference else 0,
        moments=_moments(config, batch),
        accumulated=weights if micro < step else 0,
        activations=activations,
        layer=layer,
        logits=_logits(config, micro, half),
        # A further pass starts while the last step before it is still remembered.
        records=record * max(batch, 2 * step if algo.num_iterations > 1 else 0),
        joined=record * step,
        curvature=curvature,
        update=(weights if gpu else 2 * largest_tensor) + _trial(config, step),
        copies=_half_copies(model) if half and not config.rollout.is_vllm else 0,
        kv_cache=sequence * _sequences_per_call(config, batch),
        kv_cache_of_all=sequence * max(batch, config.evaluation.num_problems * config.evaluation.samples),
        unit=FLOAT * max(embedding(model), layer_parameters(model)),
    )


def _trial(config: TrainConfig, step: int) -> int:
    """The weights before the step, its last layer twice, and the log-probs of the sampled tokens; see
    step_trial.StepTrial. 0 for a step rule that does not look."""
    rule, model = config.algo.step_rule, config.model
    if "tokens" not in rule:
        return 0
    tokens = min(rule["tokens"], min(rule["completions"], step) * config.dataset.max_completion_tokens)
    head = FLOAT * model.vocab_size * model.hidden_size
    return FLOAT * count_parameters(model) + 2 * head + FLOAT * tokens * model.vocab_size


def precision(config: TrainConfig, *, gpu: bool) -> str:
    """float32 or bfloat16: what forward passes compute in."""
    dtype = config.model.compute_dtype
    return dtype if dtype != "auto" else "bfloat16" if gpu else "float32"


def _half_copies(model: ModelConfig) -> int:
    return HALF * (model.num_hidden_layers * layer_matrices(model) + embedding(model))


def _longest(config: TrainConfig) -> int:
    return config.dataset.max_prompt_tokens + config.dataset.max_completion_tokens


def _layers(config: TrainConfig, rows: int, half: bool) -> tuple[int, int]:
    """What all layers keep of a micro-batch, and the working memory of one."""
    model, tokens = config.model, rows * _longest(config)
    hidden = FLOAT * model.hidden_size * tokens
    inner = (HALF if half else FLOAT) * model.intermediate_size * tokens
    kept = tokens * _kept_of_token(config, half) + (HALF * layer_matrices(model) if half else 0)
    after = 2 * hidden + FLOAT * model.hidden_size * rows * config.dataset.max_completion_tokens
    # Two gradients as wide as the MLP, that of its output, and a tied embedding's, which waits for its other
    # half.
    backward = 2 * inner + hidden + (FLOAT * embedding(model) if model.tie_word_embeddings else 0)
    if not model.gradient_checkpointing:
        return model.num_hidden_layers * kept + after, backward
    forward = 3 * inner + (_half_copies(model) if half else 0)
    return model.num_hidden_layers * hidden + after, max(forward, kept - hidden + backward)


def _kept_of_token(config: TrainConfig, half: bool) -> int:
    """Bytes that one decoder layer keeps of one token for its backward pass.

    float32: input and normalised input of both norms, their scales, each head's log-sum-exp. Compute dtype:
    outputs of the norms (autocast: a copy for each matrix that reads them), queries, attention's output, keys
    and values (repeated for every head, but for flash attention), four of the MLP, a row of the mask.
    """
    model, number = config.model, HALF if half else FLOAT
    width, heads, length = model.hidden_size, model.num_attention_heads, _longest(config)
    norms = FLOAT * (4 * width + 2) + number * width * (5 if half else 2)
    if model.attn_implementation.startswith("flash"):
        attention = number * 2 * (width + kv_width(model)) + FLOAT * heads
    elif model.attn_implementation == "eager":
        attention = number * 4 * width + heads * length * (FLOAT + HALF if half else FLOAT)
    else:
        attention = number * (4 * width + length) + FLOAT * heads
    return norms + attention + number * 4 * model.intermediate_size


def _logits(config: TrainConfig, rows: int, half: bool) -> int:
    """The last layer's chunk in the backward pass, and the gradient of its weights: that of the chunks
    before, and its own."""
    model, tokens = config.model, rows * config.dataset.max_completion_tokens
    one = FLOAT * min(tokens, model.logits_chunk_tokens) * model.vocab_size
    gradient = FLOAT * embedding(model)
    before = gradient if tokens > model.logits_chunk_tokens else 0
    weights = HALF * embedding(model) if half else 0
    return weights + before + max(LOGITS_COPIES * one, 2 * one + gradient)


def _record(config: TrainConfig) -> int:
    """Bytes that StepRecord holds of one completion, its row of the batch included."""
    of_token = FLOAT * config.model.hidden_size + (FLOAT + INT) * config.curvature.top_k + RECORD_BYTES
    return of_token * config.dataset.max_completion_tokens + 2 * INT * _longest(config)


def _moments(config: TrainConfig, batch: int) -> int:
    if config.curvature.optimizer_model != "adam":
        return 0
    seen = _rows_touched(config, batch * config.num_steps * config.algo.num_iterations)
    return 2 * FLOAT * seen * config.model.hidden_size + INT * config.model.vocab_size


def _rows_touched(config: TrainConfig, completions: int) -> int:
    """Vocabulary rows: at most K of each token, and all."""
    pairs = completions * config.dataset.max_completion_tokens * config.curvature.top_k
    return min(config.model.vocab_size, pairs)


def _curvature(config: TrainConfig, rows: int) -> int:
    """The fullest of curvature.mean_row_gradients, batch_shifts and apply_row_gradients."""
    tokens = rows * config.dataset.max_completion_tokens
    table = FLOAT * _rows_touched(config, rows) * config.model.hidden_size
    hidden, support = FLOAT * config.model.hidden_size * tokens, config.curvature.top_k * tokens
    gradients = hidden + SUPPORT_BYTES * support + table
    shifts = hidden + (SUPPORT_BYTES - 3 * INT) * support + 4 * table
    # A table's old and new moments live side by side.
    moments = 6 * table if config.curvature.optimizer_model == "adam" else 0
    return max(gradients, shifts, moments)


def _sequence(config: TrainConfig, half: bool) -> int:
    """Bytes of one sequence in a rollout call: the cache (keys are float32 after the rotation), one layer's
    keys and values repeated for every head, and what drawing a token takes."""
    model, number = config.model, HALF if half else FLOAT
    width = model.num_hidden_layers * kv_width(model) + model.hidden_size
    return (FLOAT + number) * width * _longest(config) + LOGITS_COPIES * FLOAT * model.vocab_size


def _sequences_per_call(config: TrainConfig, batch: int) -> int:
    """Of the larger of a training and an evaluation call, as HFRollout fills them: with whole groups."""
    samples, limit = config.evaluation.samples, config.rollout.engine.get("max_sequences_per_call", batch)
    rows = batch if config.rollout.chunking == "per_step" else min(batch, config.model.micro_batch_size)
    calls = ((rows, config.regime.group_size), (config.evaluation.num_problems * samples, samples))
    return max(min(total, max(1, limit // group) * group) for total, group in calls)
