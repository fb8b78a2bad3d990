"""Checks that no single field can make: ranges, choices and combinations; and the batch arithmetic of a run.

Imports no torch: a wrong configuration ends in under a second.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

from capo_exp.config import ConfigError, TrainConfig
from capo_exp.memory_report import describe
from capo_exp.parts import check_target, find_parts, is_local_path, resolve_model_path

Rule = tuple[Callable[[Any], bool], str]

OFF = "infinite = off: inf on the command line, .inf in YAML"
AT_LEAST_0: Rule = (lambda v: v >= 0, "an integer of at least 0")
AT_LEAST_1: Rule = (lambda v: v >= 1, "an integer of at least 1")
POSITIVE: Rule = (lambda v: 0 < v < math.inf, "a positive finite number")
SHARE: Rule = (lambda v: 0 <= v <= 1, "a number in [0, 1]")
POSITIVE_OR_INF: Rule = (lambda v: v > 0, f"a positive number ({OFF})")
NON_NEGATIVE: Rule = (lambda v: 0 <= v < math.inf, "a finite number of at least 0")
NON_NEGATIVE_OR_INF: Rule = (lambda v: v >= 0, f"a number of at least 0 ({OFF})")
NOT_NAN: Rule = (lambda v: not math.isnan(v), f"a number ({OFF})")
BETAS: Rule = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)")
OPEN_BETAS: Rule = (lambda v: len(v) == 2 and all(0 < b < 1 for b in v), "two numbers inside (0, 1)")
DEVICE: Rule = (lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v) is not None, "auto, cpu, cuda or cuda:N")
FOLDER: Rule = (
    lambda v: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", v) is not None,
    "the name of one folder: letters, digits, dot, underscore, hyphen",
)
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def one_of(*choices: str) -> Rule:
    return lambda v: v in choices, f"one of {', '.join(choices)}"


RULES: dict[str, Rule] = {
    "num_steps": AT_LEAST_1,
    "seed": (lambda v: 0 <= v < 2**32, "an integer in [0, 2**32)"),
    "device": DEVICE,
    "experiment_name": FOLDER,
    "output_dir": (bool, "a directory"),
    "algo.variant": (lambda v: v == "" or FOLDER[0](v), "empty, or a short name without spaces"),
    "algo.max_sampling_rounds": AT_LEAST_1,
    "algo.filter_denominator": one_of("all", "kept"),
    "algo.num_iterations": AT_LEAST_1,
    "algo.num_minibatches": AT_LEAST_1,
    "algo.kl_coefficient": NON_NEGATIVE,
    "algo.reference_reset_every": AT_LEAST_0,
    "algo.optimizer_reset_every": AT_LEAST_0,
    "model.model_type": (bool, "the model_type of its config.json, such as qwen2 or llama"),
    "model.vocab_size": AT_LEAST_1,
    "model.hidden_size": AT_LEAST_1,
    "model.intermediate_size": AT_LEAST_1,
    "model.num_hidden_layers": AT_LEAST_1,
    "model.num_attention_heads": AT_LEAST_1,
    "model.num_key_value_heads": AT_LEAST_1,
    "model.compute_dtype": one_of("auto", "float32", "bfloat16"),
    "model.attn_implementation": (
        lambda v: v in ATTENTION or "/" in v,
        f"{', '.join(ATTENTION)} or a hub kernel org/name",
    ),
    "model.reference_learning_rate": POSITIVE,
    "model.micro_batch_size": AT_LEAST_1,
    "model.logits_chunk_tokens": AT_LEAST_1,
    "dataset.template": (lambda v: "{problem}" in v, "text with {problem} in it"),
    "dataset.max_prompt_tokens": AT_LEAST_1,
    "dataset.max_completion_tokens": AT_LEAST_1,
    "regime.learning_rate": NON_NEGATIVE,
    "regime.prompts_per_step": AT_LEAST_1,
    "regime.group_size": AT_LEAST_1,
    "rollout.chunking": one_of("per_step", "per_micro_batch"),
    "rollout.temperature": POSITIVE,
    "rollout.top_k": (lambda v: v >= 0, "an integer of at least 0 (0 = off)"),
    "rollout.top_p": (lambda v: 0 < v <= 1, "a number in (0, 1] (1 = off)"),
    "optimizer.betas": BETAS,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NON_NEGATIVE,
    "optimizer.max_grad_norm": POSITIVE_OR_INF,
    # The schedules of transformers.get_scheduler that need no further numbers.
    "optimizer.schedule": one_of(
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt"
    ),
    "optimizer.warmup_ratio": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "logger.wandb_mode": one_of("auto", "online", "offline", "disabled"),
    "logger.completions_every": AT_LEAST_0,
    "logger.completions_groups": AT_LEAST_1,
    "curvature.optimizer_model": one_of("adam", "adam_live", "sgd"),
    "curvature.top_k": AT_LEAST_1,
    "curvature.hidden_shift": (lambda v: v in (0, 1), "0, or 1 to compare with the authors' program"),
    "curvature.calibrate_every": AT_LEAST_0,
    "curvature.calibrate_completions": AT_LEAST_1,
    "curvature.calibrate_tokens": AT_LEAST_1,
    "curvature.betas": OPEN_BETAS,
    "curvature.eps": POSITIVE,
    "evaluation.every": AT_LEAST_0,
    "evaluation.num_problems": AT_LEAST_1,
    "evaluation.samples": AT_LEAST_1,
    "evaluation.temperature": NON_NEGATIVE,
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
    "weight_eps": NON_NEGATIVE_OR_INF,
    "dual_clip": (lambda v: v > 1, f"a number above 1 ({OFF})"),
    "tightness": SHARE,
    "drift_coefficient": NON_NEGATIVE,
    "drift_max": NON_NEGATIVE_OR_INF,
    "kl_coefficient": NON_NEGATIVE,
    "target_std": POSITIVE,
    "max_weight": (lambda v: v >= 1, f"a number of at least 1 ({OFF})"),
    "threshold": NON_NEGATIVE,
    "max_length": AT_LEAST_1,
    "cache": AT_LEAST_1,
    "length": AT_LEAST_1,
    "num_train": AT_LEAST_1,
    "num_eval": AT_LEAST_1,
    "max_sequences_per_call": AT_LEAST_1,
    "timeout_seconds": POSITIVE,
    "workers": AT_LEAST_1,
}
"""Numbers of parts, by parameter name."""

GROUP_BASELINES = (
    "group_normalised", "group_centred", "first_of_group", "leave_one_out", "clip_filter_weighted",
)  # fmt: skip
"""Advantages that compare the completions of a prompt."""


def check(config: TrainConfig) -> None:
    """Refuses what cannot work.

    Raises:
        ConfigError: one line, `key=value: expected ...`, for the first problem found.
    """
    for key, rule in RULES.items():
        _apply(rule, key, reduce(getattr, key.split("."), config))
    for key, part in find_parts(config):
        check_target(part, key=key)
        _check_part(part, key)
    _check_no_nan(asdict(config))
    _check_algorithm(config)
    _check_batch(config)
    _check_optimizer_model(config)
    _check_vocabulary(config)
    _check_sampling(config)
    _check_model(config)


def plan(config: TrainConfig) -> list[str]:
    """The batch arithmetic of a run and the memory it takes, one line each."""
    regime, steps, tokens = config.regime, config.num_steps, config.dataset.max_completion_tokens
    batch = regime.prompts_per_step * regime.group_size
    micro = min(config.model.micro_batch_size, batch)
    iterations, minibatches = config.algo.num_iterations, config.algo.num_minibatches
    cuts = f" x {_count(minibatches, 'minibatch', 'minibatches')}" if minibatches > 1 else ""
    evaluations = count_evaluations(steps, config.evaluation.every)
    eval_rows = config.evaluation.num_problems * config.evaluation.samples
    return [
        f"{config.algo.label} on {config.dataset.name} with {config.model.name}, "
        f"peak learning rate {regime.learning_rate:g} ({regime.name}), seed {config.seed}",
        f"{regime.prompts_per_step} prompts x {regime.group_size} = {batch:,} completions a step"
        f" = {_count(batch // micro, 'micro-batch', 'micro-batches')} of {micro}",
        f"{_count(steps, 'step')} x {_count(iterations, 'iteration')}{cuts}"
        f" = {_count(steps * iterations * minibatches, 'optimiser step')}",
        f"{_count(batch * steps, 'completion')} of at most {tokens:,} tokens"
        f" = at most {batch * steps * tokens:,} generated tokens",
        f"{_count(evaluations, 'evaluation')} of at most {_count(eval_rows, 'completion')}",
        *describe(config),
    ]


def count_evaluations(num_steps: int, every: int) -> int:
    """Before the first step, after every `every` steps, and after the last."""
    return 2 if every == 0 else 1 + -(-num_steps // every)


def _count(number: int, unit: str, units: str = "") -> str:
    return f"{number:,} {unit if number == 1 else units or unit + 's'}"


def _apply(rule: Rule, key: str, value: Any) -> None:
    holds, expected = rule
    if not holds(value):
        raise _error(key, value, expected)


def _error(key: str, value: Any, expected: str) -> ConfigError:
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]  # as YAML writes it
    return ConfigError(f"{key}={value}: expected {expected}".replace("\n", "\\n"))


def _check_no_nan(node: Any, key: str = "") -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            _check_no_nan(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, float) and math.isnan(node):
        raise _error(key, node, "a number")


def _check_part(part: Mapping[str, Any], key: str) -> None:
    for parameter, value in part.items():
        if isinstance(value, Mapping) and "_target_" not in value:  # such as the bounds of one level
            _check_part(value, f"{key}.{parameter}")
        holds, expected = PART_RULES.get(parameter, (lambda _: True, ""))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if parameter in PART_RULES and not (number and holds(value)):
            raise _error(f"{key}.{parameter}", value, expected)


def _check_algorithm(config: TrainConfig) -> None:
    algo = config.algo
    low, high = algo.selection.get("objective_shift_min"), algo.selection.get("objective_shift_max")
    if low is not None and high is not None and low > high:
        raise _error("algo.selection.objective_shift_min", low, f"at most objective_shift_max={high}")
    baseline = str(algo.advantage.get("_target_", "")).rpartition(".")[2]
    if config.regime.group_size == 1 and baseline in GROUP_BASELINES:
        wanted = f"at least 2, since {baseline} compares the completions of a prompt"
        raise _error("regime.group_size", 1, wanted)
    if algo.reference_reset_every and not algo.needs_reference:
        raise _error(
            "algo.reference_reset_every", algo.reference_reset_every, "0 without a KL to a reference"
        )
    batch = config.regime.prompts_per_step * config.regime.group_size
    if algo.num_minibatches > batch:
        wanted = f"at most regime.prompts_per_step x regime.group_size = {batch}"
        raise _error("algo.num_minibatches", algo.num_minibatches, wanted)


def _check_batch(config: TrainConfig) -> None:
    batch = config.regime.prompts_per_step * config.regime.group_size
    micro = config.model.micro_batch_size
    if batch > micro and batch % micro:
        raise _error(
            "model.micro_batch_size",
            micro,
            f"a divisor of regime.prompts_per_step x regime.group_size = {batch}, or at least {batch}",
        )


def _check_optimizer_model(config: TrainConfig) -> None:
    if config.curvature.optimizer_model == "adam_live":
        _apply(OPEN_BETAS, "optimizer.betas", config.optimizer.betas)


def _check_vocabulary(config: TrainConfig) -> None:
    vocabulary = config.model.vocab_size
    for key, value in (("curvature.top_k", config.curvature.top_k), ("rollout.top_k", config.rollout.top_k)):
        if value > vocabulary:
            raise _error(key, value, f"at most model.vocab_size={vocabulary}")


def _check_sampling(config: TrainConfig) -> None:
    if config.evaluation.samples > 1 and config.evaluation.temperature == 0:
        wanted = "1 with evaluation.temperature=0, since greedy decoding gives the same completion each time"
        raise _error("evaluation.samples", config.evaluation.samples, wanted)
    if config.dataset.system_prompt is not None and not config.dataset.apply_chat_template:
        raise _error("dataset.apply_chat_template", False, "true, since dataset.system_prompt is set")


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if not is_local_path(model.path):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model.path):
            raise _error("model.path", model.path, "a directory, pkg://capo_exp/..., or a hub id org/name")
    elif not (Path(resolve_model_path(model.path)) / "config.json").is_file():
        raise _error("model.path", model.path, f"config.json in {resolve_model_path(model.path)}")
    elif model.revision is not None:
        raise _error("model.revision", model.revision, "null for a local model.path")
    flash = model.attn_implementation.startswith("flash_attention")
    if flash and (config.device == "cpu" or model.compute_dtype == "float32"):
        raise _error("model.attn_implementation", model.attn_implementation, "sdpa on a CPU or in float32")
