"""Whether a configuration can work: rules.py's ranges and choices, and combinations; and a run's arithmetic.

Imports no torch: a wrong configuration ends in under a second.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

from capo_exp.config.build import MADE_HERE, check_target, find_parts, is_local_path, resolve_model_path
from capo_exp.config.errors import error
from capo_exp.config.plan import describe
from capo_exp.config.ranges import OPEN_BETAS, PART_RULES, RULES, VLLM_RULES, apply
from capo_exp.config.schema import TrainConfig

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
        apply(rule, key, reduce(getattr, key.split("."), config))
    for key, part in find_parts(config):
        check_target(part, key=key)
        _check_part(part, key)
    _check_no_nan(asdict(config))
    _check_algorithm(config)
    _check_batch(config)
    _check_optimizer_model(config)
    _check_vocabulary(config)
    _check_rollout(config)
    _check_sampling(config)
    _check_correction(config)
    _check_terms(config)
    _check_examples(config)
    _check_model(config)


def check_trains(config: TrainConfig) -> None:
    """Refuses a dataset that is there to evaluate on.

    Raises:
        ConfigError: dataset.train_split is null.
    """
    if config.dataset.train_split is None:
        wanted = f"a dataset with a training split, such as math; {config.dataset.name} is to evaluate on"
        raise error("dataset.train_split", None, wanted)


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


def _check_no_nan(node: Any, key: str = "") -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            _check_no_nan(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, float) and math.isnan(node):
        raise error(key, node, "a number")


def _check_part(part: Mapping[str, Any], key: str) -> None:
    for parameter, value in part.items():
        if isinstance(value, Mapping) and "_target_" not in value:  # such as the bounds of one level
            _check_part(value, f"{key}.{parameter}")
        holds, expected = PART_RULES.get(parameter, (lambda _: True, ""))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if parameter in PART_RULES and not (number and holds(value)):
            raise error(f"{key}.{parameter}", value, expected)


def _check_algorithm(config: TrainConfig) -> None:
    algo = config.algo
    low, high = algo.selection.get("objective_shift_min"), algo.selection.get("objective_shift_max")
    if low is not None and high is not None and low > high:
        raise error("algo.selection.objective_shift_min", low, f"at most objective_shift_max={high}")
    baseline = str(algo.advantage.get("_target_", "")).rpartition(".")[2]
    if config.regime.group_size == 1 and baseline in GROUP_BASELINES:
        wanted = f"at least 2, since {baseline} compares the completions of a prompt"
        raise error("regime.group_size", 1, wanted)
    if algo.reference_reset_every and not algo.needs_reference:
        raise error("algo.reference_reset_every", algo.reference_reset_every, "0 without a KL to a reference")
    batch = config.regime.prompts_per_step * config.regime.group_size
    if algo.num_minibatches > batch:
        wanted = f"at most regime.prompts_per_step x regime.group_size = {batch}"
        raise error("algo.num_minibatches", algo.num_minibatches, wanted)


def _check_batch(config: TrainConfig) -> None:
    batch = config.regime.prompts_per_step * config.regime.group_size
    micro = config.model.micro_batch_size
    if batch > micro and batch % micro:
        raise error(
            "model.micro_batch_size",
            micro,
            f"a divisor of regime.prompts_per_step x regime.group_size = {batch}, or at least {batch}",
        )


def _check_optimizer_model(config: TrainConfig) -> None:
    if config.curvature.optimizer_model == "adam_live":
        apply(OPEN_BETAS, "optimizer.betas", config.optimizer.betas)


def _check_vocabulary(config: TrainConfig) -> None:
    vocabulary = config.model.vocab_size
    for key, value in (("curvature.top_k", config.curvature.top_k), ("rollout.top_k", config.rollout.top_k)):
        if value > vocabulary:
            raise error(key, value, f"at most model.vocab_size={vocabulary}")


def _check_rollout(config: TrainConfig) -> None:
    rollout, dataset = config.rollout, config.dataset
    engine = rollout.engine
    if not rollout.is_vllm:
        if rollout.server_url is not None:
            raise error("rollout.server_url", rollout.server_url, "null, or rollout=vllm")
        return
    if rollout.server_url is not None and not re.match(r"https?://[^/]|start$", rollout.server_url):
        raise error(
            "rollout.server_url", rollout.server_url, "null, start, or a URL such as http://node7:8000"
        )
    longest = dataset.max_prompt_tokens + dataset.max_completion_tokens
    if engine["max_model_len"] < longest:
        wanted = f"at least dataset.max_prompt_tokens + dataset.max_completion_tokens = {longest}"
        raise error("rollout.engine.max_model_len", engine["max_model_len"], wanted)
    if (rollout.top_k or rollout.top_p < 1) and rollout.temperature != 1:
        wanted = (
            "1 with rollout=vllm and top_k or top_p: vLLM then renormalises log-probs over what is left of "
            "the vocabulary, or gives those of temperature 1; neither can be compared with the learner's"
        )
        raise error("rollout.temperature", rollout.temperature, wanted)
    size, devices = engine["tensor_parallel_size"], engine["visible_devices"]
    if size > 1 and devices is None and rollout.server_url in (None, "start"):
        wanted = "1, or rollout.engine.visible_devices, since the learner has one GPU"
        raise error("rollout.engine.tensor_parallel_size", size, wanted)
    for group in (rollout, config.evaluation):
        if group.temperature > 2:
            name = "rollout" if group is rollout else "evaluation"
            raise error(f"{name}.temperature", group.temperature, "at most 2, the limit of vLLM")
    for key, rule in VLLM_RULES.items():
        apply(rule, f"rollout.engine.{key}", engine[key])


def _check_sampling(config: TrainConfig) -> None:
    if config.evaluation.samples > 1 and config.evaluation.temperature == 0:
        wanted = "1 with evaluation.temperature=0, since greedy decoding gives the same completion each time"
        raise error("evaluation.samples", config.evaluation.samples, wanted)


def _check_correction(config: TrainConfig) -> None:
    target = str(config.rollout.correction["_target_"])
    if config.rollout.train_engine is not None and not target.endswith(".uncorrected"):
        wanted = "rollout/correction=none with rollout.train_engine, whose "
        raise error("rollout.correction._target_", target, f"{wanted}completions nobody sampled")


def _check_terms(config: TrainConfig) -> None:
    """A weight on a term that there is none of."""
    for name in ("format", "length"):
        weight = getattr(config.reward, f"{name}_weight")
        if weight and getattr(config.reward, name)["_target_"] == f"capo_exp.grading.terms.no_{name}":
            wanted = f"0, or a function of capo_exp.grading.terms as reward.{name}"
            raise error(f"reward.{name}_weight", weight, wanted)


def _check_examples(config: TrainConfig) -> None:
    for index, example in enumerate(config.dataset.examples):
        texts = all(isinstance(text, str) and text.strip() for text in example.values())
        if set(example) != {"problem", "solution"} or not texts:
            raise error(f"dataset.examples[{index}]", example, "problem and solution, each of them text")


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if not is_local_path(model.path):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model.path):
            wanted = "a directory, pkg://capo_exp/..., or a hub id org/name"
            made = f"; python scripts/pretrain.py warm_start={model.name} makes it"
            raise error("model.path", model.path, wanted + made * (model.path.startswith("outputs/models/")))
    elif model.path.startswith(MADE_HERE) and model.path != f"{MADE_HERE}smollm2_135m":
        raise error("model.path", model.path, f"{MADE_HERE}smollm2_135m, the only model that is made here")
    elif (
        not model.path.startswith(MADE_HERE)
        and not (Path(resolve_model_path(model.path)) / "config.json").is_file()
    ):
        raise error("model.path", model.path, f"config.json in {resolve_model_path(model.path)}")
    elif model.revision is not None:
        raise error("model.revision", model.revision, "null for a local model.path")
    flash = model.attn_implementation.startswith("flash_attention")
    if flash and (config.device == "cpu" or model.compute_dtype == "float32"):
        raise error("model.attn_implementation", model.attn_implementation, "sdpa on a CPU or in float32")
