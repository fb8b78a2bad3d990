"""What each number and text of the configuration may be. Imports no torch."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from capo_exp.config.errors import error


class Rule(NamedTuple):
    """A range or a choice: stands in `Annotated[float, POSITIVE]` of a part's parameter."""

    holds: Callable[[Any], bool]
    expected: str
    """Goes on after "expected"."""


OFF = "infinite = off: inf on the command line, .inf in YAML"
AT_LEAST_0 = Rule(lambda v: v >= 0, "an integer of at least 0")
AT_LEAST_1 = Rule(lambda v: v >= 1, "an integer of at least 1")
POSITIVE = Rule(lambda v: 0 < v < math.inf, "a positive finite number")
SHARE = Rule(lambda v: 0 <= v <= 1, "a number in [0, 1]")
POSITIVE_OR_INF = Rule(lambda v: v > 0, f"a positive number ({OFF})")
NON_NEGATIVE = Rule(lambda v: 0 <= v < math.inf, "a finite number of at least 0")
NON_NEGATIVE_OR_INF = Rule(lambda v: v >= 0, f"a number of at least 0 ({OFF})")
FINITE = Rule(math.isfinite, "a finite number")
NOT_NAN = Rule(lambda v: not math.isnan(v), f"a number ({OFF})")
BETAS = Rule(lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)")
OPEN_BETAS = Rule(lambda v: len(v) == 2 and all(0 < b < 1 for b in v), "two numbers inside (0, 1)")
DEVICE = Rule(lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v) is not None, "auto, cpu, cuda or cuda:N")
FOLDER = Rule(
    lambda v: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", v) is not None,
    "the name of one folder: letters, digits, dot, underscore, hyphen",
)
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
AT_LEAST_1_OR_INF = Rule(lambda v: v >= 1, f"a number of at least 1 ({OFF})")
ABOVE_1_OR_INF = Rule(lambda v: v > 1, f"a number above 1 ({OFF})")
ABOVE_0_TO_1 = Rule(lambda v: 0 < v <= 1, "a number in (0, 1]")
FROM_1 = Rule(lambda v: 1 <= v < math.inf, "a finite number of at least 1")


def one_of(*choices: str) -> Rule:
    return Rule(lambda v: v in choices, f"one of {', '.join(choices)}")


RULES: dict[str, Rule] = {
    "num_steps": AT_LEAST_1,
    "stop_after_unrewarded": AT_LEAST_0,
    "seed": Rule(lambda v: 0 <= v < 2**32, "an integer in [0, 2**32)"),
    "device": DEVICE,
    "experiment_name": FOLDER,
    "output_dir": Rule(bool, "a directory"),
    "sweep.devices": Rule(
        lambda v: all(re.fullmatch(r"[\w,-]+", d) for d in v), "a list of GPUs, such as [0,1]"
    ),
    "sweep.pruner": one_of("none", "median"),
    "sweep.pruner_startup_runs": AT_LEAST_1,
    "sweep.pruner_warmup_steps": AT_LEAST_0,
    "algo.variant": Rule(lambda v: v == "" or FOLDER[0](v), "empty, or a short name without spaces"),
    "algo.max_sampling_rounds": AT_LEAST_1,
    "algo.filter_denominator": one_of("all", "kept"),
    "algo.num_iterations": AT_LEAST_1,
    "algo.num_minibatches": AT_LEAST_1,
    "algo.kl_coefficient": NON_NEGATIVE,
    "algo.reference_reset_every": AT_LEAST_0,
    "algo.optimizer_reset_every": AT_LEAST_0,
    "model.model_type": Rule(bool, "the model_type of its config.json, such as qwen2 or llama"),
    "model.vocab_size": AT_LEAST_1,
    "model.hidden_size": AT_LEAST_1,
    "model.intermediate_size": AT_LEAST_1,
    "model.num_hidden_layers": AT_LEAST_1,
    "model.num_attention_heads": AT_LEAST_1,
    "model.num_key_value_heads": AT_LEAST_1,
    "model.compute_dtype": one_of("auto", "float32", "bfloat16"),
    "model.attn_implementation": Rule(
        lambda v: v in ATTENTION or "/" in v,
        f"{', '.join(ATTENTION)} or a hub kernel org/name",
    ),
    "model.reference_learning_rate": POSITIVE,
    "model.micro_batch_size": AT_LEAST_1,
    "model.logits_chunk_tokens": AT_LEAST_1,
    "dataset.template": Rule(lambda v: "{problem}" in v, "text with {problem} in it"),
    "dataset.max_prompt_tokens": AT_LEAST_1,
    "dataset.max_completion_tokens": AT_LEAST_1,
    "regime.learning_rate": NON_NEGATIVE,
    "regime.prompts_per_step": AT_LEAST_1,
    "regime.group_size": AT_LEAST_1,
    "rollout.chunking": one_of("per_step", "per_micro_batch"),
    "dataset.eval_order": one_of("file", "shuffled"),
    "rollout.temperature": POSITIVE,
    "rollout.top_k": Rule(lambda v: v >= 0, "an integer of at least 0 (0 = off)"),
    "rollout.top_p": Rule(lambda v: 0 < v <= 1, "a number in (0, 1] (1 = off)"),
    "reward.format_weight": FINITE,
    "reward.length_weight": FINITE,
    "optimizer.betas": BETAS,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NON_NEGATIVE,
    "optimizer.max_grad_norm": POSITIVE_OR_INF,
    # The schedules of transformers.get_scheduler that need no further numbers.
    "optimizer.schedule": one_of(
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt"
    ),
    "optimizer.warmup_ratio": Rule(lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "logger.wandb_mode": one_of("auto", "online", "offline", "disabled"),
    "logger.completions_every": AT_LEAST_0,
    "logger.completions_groups": AT_LEAST_1,
    "curvature.optimizer_model": one_of("adam", "adam_live", "sgd"),
    "curvature.top_k": AT_LEAST_1,
    "curvature.hidden_shift": Rule(lambda v: v in (0, 1), "0, or 1 to compare with the authors' program"),
    "curvature.calibrate_every": AT_LEAST_0,
    "curvature.calibrate_completions": AT_LEAST_1,
    "curvature.calibrate_tokens": AT_LEAST_1,
    "curvature.diagnose_every": AT_LEAST_0,
    "curvature.betas": OPEN_BETAS,
    "curvature.eps": POSITIVE,
    "evaluation.every": AT_LEAST_0,
    "evaluation.num_problems": AT_LEAST_1,
    "evaluation.samples": AT_LEAST_1,
    "evaluation.temperature": NON_NEGATIVE,
    "evaluation.top_p": Rule(lambda v: 0 < v <= 1, "a number in (0, 1] (1 = off)"),
    "checkpoint.every": AT_LEAST_1,
    "checkpoint.keep": AT_LEAST_1,
}

PART_RULES: dict[str, Rule] = {
    "eps": POSITIVE,
    "policy_shift_max": NON_NEGATIVE_OR_INF,
    "objective_shift_min": NOT_NAN,
    "objective_shift_max": NOT_NAN,
    "positive_policy_shift_max": NON_NEGATIVE_OR_INF,
    "negative_policy_shift_max": NON_NEGATIVE_OR_INF,
    "positive_objective_shift_max": NON_NEGATIVE_OR_INF,
    "negative_objective_shift_max": NON_NEGATIVE_OR_INF,
    "rate": SHARE,
    "clip_eps_low": NON_NEGATIVE_OR_INF,
    "clip_eps_high": NON_NEGATIVE_OR_INF,
    "delta_low": NON_NEGATIVE_OR_INF,
    "delta_high": NON_NEGATIVE_OR_INF,
    "weight_eps": NON_NEGATIVE_OR_INF,
    "dual_clip": Rule(lambda v: v > 1, f"a number above 1 ({OFF})"),
    "tightness": SHARE,
    "drift_coefficient": NON_NEGATIVE,
    "drift_max": NON_NEGATIVE_OR_INF,
    "kl_coefficient": NON_NEGATIVE,
    "target_std": POSITIVE,
    "max_weight": Rule(lambda v: v >= 1, f"a number of at least 1 ({OFF})"),
    "threshold": NON_NEGATIVE,
    "max_length": AT_LEAST_1,
    "cache": AT_LEAST_1,
    "length": AT_LEAST_1,
    "max_tokens": AT_LEAST_1,
    "num_train": AT_LEAST_1,
    "num_eval": AT_LEAST_1,
    "max_sequences_per_call": AT_LEAST_1,
    "max_num_seqs": AT_LEAST_1,
    "max_model_len": AT_LEAST_1,
    "gpu_memory_utilization": Rule(lambda v: 0 < v <= 1, "a number in (0, 1]"),
    "tensor_parallel_size": AT_LEAST_1,
    "sleep_level": Rule(lambda v: v in (0, 1, 2), "0, 1 or 2"),
    "start_seconds": POSITIVE,
    "generate_seconds": POSITIVE,
    "transfer_seconds": POSITIVE,
    "timeout_seconds": POSITIVE,
    "workers": AT_LEAST_1,
    "ratio_cap": POSITIVE,
    "ratio_low": Rule(lambda v: 0 < v <= 1, "a number in (0, 1]"),
    "ratio_high": Rule(lambda v: 1 <= v < math.inf, "a finite number of at least 1"),
}
"""Numbers of parts, by parameter name."""


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


DTYPES = ("float32", "bfloat16", "float16")
VLLM_RULES: dict[str, Rule] = {
    "dtype": one_of("auto", *DTYPES),
    "weight_transfer": one_of("auto", "ipc", "nccl", "safetensors"),
    "kv_cache_gib": Rule(lambda v: v is None or _positive(v), "null or a positive number"),
    "visible_devices": Rule(
        lambda v: v is None or re.fullmatch(r"[\w-]+(,[\w-]+)*", str(v)) is not None,
        "null, or GPUs as CUDA_VISIBLE_DEVICES names them",
    ),
    "model_path": Rule(lambda v: isinstance(v, str) and v != "", "a directory or a hub id"),
    "max_probe_difference": Rule(
        lambda v: isinstance(v, dict) and set(v) >= set(DTYPES) and all(map(_positive, v.values())),
        f"a positive number for each of {', '.join(DTYPES)}",
    ),
}
"""What numbers of rollout=vllm may be beside PART_RULES, which are for numbers only."""


def apply(rule: Rule, key: str, value: Any) -> None:
    """Raises ConfigError if the value of a key breaks the rule."""
    holds, expected = rule
    if not holds(value):
        raise error(key, value, expected)
