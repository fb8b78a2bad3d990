"""Whether a configuration can work: its ranges, its parts, and what its keys forbid each other.

What needs no part is checked first, without torch: such a mistake ends in under a second.
"""

import json
import math
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any

from capo_exp.config import build
from capo_exp.config.architecture import HubSilent, no_model, read_architecture
from capo_exp.config.declare import OFFERS, asked, declares
from capo_exp.config.engine_checks import check_distributed, check_vllm
from capo_exp.config.errors import ConfigError, error
from capo_exp.config.places import MADE_HERE, is_local_path
from capo_exp.config.plugins import allowed_plugins, find_package
from capo_exp.config.ranges import OPEN_BETAS, apply
from capo_exp.config.schema import ModelConfig, TrainConfig


def check(config: TrainConfig) -> None:
    """Refuses what cannot work. Imports torch unless it finds something before it looks at the parts.

    Raises:
        ConfigError: one line, `key=value: expected ...`, for the first problem found.
    """
    check_ranges(config)
    _check_plugins(config)
    for key, part in build.find_parts(config):
        build.check_target(part, key=key)
    _check_batch(config)
    _check_vocabulary(config)
    _check_sampling(config)
    _check_terms(config)
    _check_logger(config)
    _check_examples(config)
    _check_model(config)
    _check_parts_of_steps(config)
    build.check_parts(config)
    _check_algorithm(config)
    if config.rollout.is_vllm:
        check_vllm(config)
    if config.distributed.name != "single":
        check_distributed(config)
    elif config.distributed.world_size > 1:
        raise error("distributed.processes", config.distributed.world_size, "1, or distributed=fsdp2")


def check_trains(config: TrainConfig) -> None:
    """Refuses a dataset that is there to evaluate on, and a tracker that is not installed.

    Raises:
        ConfigError: dataset.train_split is null, or the package of logger is missing.
    """
    check_tracker(config.logger.name)
    source, split = config.dataset.source, config.dataset.train_split
    if split != "train" and source.get("eval_path") is not None:
        wanted = "train beside dataset.source.eval_path, in which every other split is looked for"
        raise error("dataset.train_split", split, wanted)
    if split is None:
        wanted = f"a dataset with a training split, such as math; {config.dataset.name} is to evaluate on"
        raise error("dataset.train_split", None, wanted)


def check_tracker(name: str) -> None:
    """Raises ConfigError if the package of logger=NAME is not installed."""
    if name != "files" and find_spec(name) is None:
        raise error("logger", name, f'its package: pip install "capo_exp[{name}]"; or logger=files')


def check_ranges(node: Any, prefix: str = "") -> None:
    """Compares the values of a group and of those in it with the ranges of their fields.

    Raises:
        ConfigError: for the first that is not within.
    """
    for field in fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif "range" in field.metadata:
            apply(field.metadata["range"], key, value)


def _check_plugins(config: TrainConfig) -> None:
    allowed = allowed_plugins()
    unasked = [name for name in config.plugins if find_package(name) not in allowed]
    if unasked:
        wanted = f"plugins=[{','.join(unasked)}] on the command line of this process: a file allows nothing"
        raise error("plugins", f"[{','.join(unasked)}]", wanted)


def _check_batch(config: TrainConfig) -> None:
    batch = config.regime.prompts_per_step * config.regime.group_size
    micro, product = config.model.micro_batch_size, "regime.prompts_per_step x regime.group_size"
    tokens, longest = config.model.max_tokens_per_micro_batch, config.dataset.longest_row
    if tokens is None and batch > micro and batch % micro:
        raise error("model.micro_batch_size", micro, f"a divisor of {product} = {batch}, or at least {batch}")
    if tokens is not None and tokens < longest:
        wanted = f"at least dataset.max_prompt_tokens + dataset.max_completion_tokens = {longest}"
        raise error("model.max_tokens_per_micro_batch", tokens, wanted)
    if config.algo.num_minibatches > batch:
        raise error("algo.num_minibatches", config.algo.num_minibatches, f"at most {product} = {batch}")


def _check_vocabulary(config: TrainConfig) -> None:
    vocabulary = config.model.vocab_size or math.inf
    for key, value in (("curvature.top_k", config.curvature.top_k), ("rollout.top_k", config.rollout.top_k)):
        if value > vocabulary:
            raise error(key, value, f"at most model.vocab_size={vocabulary}")


def _check_sampling(config: TrainConfig) -> None:
    evaluation, rollout = config.evaluation, config.rollout
    if evaluation.samples > 1 and evaluation.temperature == 0:
        wanted = "1 with evaluation.temperature=0, since greedy decoding gives the same completion each time"
        raise error("evaluation.samples", evaluation.samples, wanted)
    if rollout.server_url is not None and not rollout.is_vllm:
        raise error("rollout.server_url", rollout.server_url, "null, or rollout=vllm")
    target = str(rollout.correction["_target_"])
    if rollout.train_engine is not None and not target.endswith(".uncorrected"):
        wanted = "rollout/correction=none with rollout.train_engine, whose completions nobody sampled"
        raise error("rollout.correction._target_", target, wanted)
    if not target.endswith(".uncorrected"):
        without = f"rollout/correction=none with algo={config.algo.name}, "
        if build.part_declares(config.algo.token_loss, "algo.token_loss", "regresses"):
            raise error("rollout.correction._target_", target, f"{without}of which the advantage is a target")
        if key := build.find_nonzero(config.algo.token_loss, "algo.token_loss", "corrects"):
            raise error("rollout.correction._target_", target, f"{without}which corrects, or {key}=0")
    curvature = config.curvature
    if curvature.moments_dtype != "float32" and curvature.optimizer_model != "adam":
        wanted = f"float32: curvature.optimizer_model={curvature.optimizer_model} has no table of its own"
        raise error("curvature.moments_dtype", curvature.moments_dtype, wanted)
    if curvature.optimizer_model == "adam_live":
        apply(OPEN_BETAS, "optimizer.betas", config.optimizer.betas)


def _check_terms(config: TrainConfig) -> None:
    """Refuses a weight on a term that there is none of."""
    reward = config.reward
    for name in ("format", "length"):
        term, weight = getattr(reward, name), getattr(reward, f"{name}_weight")
        if weight and term["_target_"] == f"capo_exp.grading.terms.no_{name}":
            wanted = f"0, or a function of capo_exp.grading.terms as reward.{name}"
            raise error(f"reward.{name}_weight", weight, wanted)


def _check_logger(config: TrainConfig) -> None:
    """Refuses histograms at steps of which no completions are kept."""
    completions, histograms = config.logger.completions_every, config.logger.histograms_every
    if histograms % completions if completions else histograms:
        wanted = f"a multiple of logger.completions_every={completions}, whose completions they are made of"
        raise error("logger.histograms_every", histograms, f"0, or {wanted}" if completions else "0")


def _check_examples(config: TrainConfig) -> None:
    for index, example in enumerate(config.dataset.examples):
        texts = all(isinstance(text, str) and text.strip() for text in example.values())
        if set(example) != {"problem", "solution"} or not texts:
            raise error(f"dataset.examples[{index}]", example, "problem and solution, each of them text")


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if not is_local_path(model.path):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model.path):
            lacks = "expected a directory, pkg://capo_exp/..., or a hub id org/name"
            if model.path.startswith("outputs/models/"):
                lacks += f"; python scripts/pretrain.py warm_start={model.name} makes it"
            raise ConfigError(no_model(model.path, lacks))
    elif model.path.startswith(MADE_HERE) and model.path != f"{MADE_HERE}smollm2_135m":
        raise error("model.path", model.path, f"{MADE_HERE}smollm2_135m, the only one made here")
    with suppress(HubSilent):  # which the plan tells, and a run refuses
        _check_architecture(model)
    if model.revision is not None and is_local_path(model.path):
        raise error("model.revision", model.revision, "null for a local model.path")
    if "/" in model.attn_implementation and find_spec("kernels") is None:
        wanted = "sdpa, or the package kernels to be installed, which loads a kernel from the hub"
        raise error("model.attn_implementation", model.attn_implementation, wanted)
    if model.share_prompts and model.gradient_checkpointing:
        wanted = "false with model.gradient_checkpointing=true, which keeps no keys and values"
        raise error("model.share_prompts", True, wanted)
    if model.compile and (model.pack or model.share_prompts):
        key = "model.pack" if model.pack else "model.share_prompts"
        raise error(key, True, "false with model.compile=true, which would compile every layer on its own")
    if model.pack and model.share_prompts:
        wanted = "false with model.pack=true, whose rows each have their prompt before them"
        raise error("model.share_prompts", True, wanted)
    flash = model.attn_implementation.startswith("flash_attention")
    if model.pack and not flash and model.attn_implementation != "sdpa":
        wanted = "sdpa, flash_attention_2 or flash_attention_3 with model.pack=true"
        raise error("model.attn_implementation", model.attn_implementation, wanted)
    if flash and (config.device == "cpu" or model.compute_dtype == "float32"):
        raise error("model.attn_implementation", model.attn_implementation, "sdpa on a CPU or in float32")


def _check_architecture(model: ModelConfig) -> None:
    """Compares what a record or the command line says of the shape with what the model says of itself."""
    for name, stated in read_architecture(model.path, model.revision).items():
        given = getattr(model, name)
        if given is not None and given != stated:
            wanted = f"{json.dumps(stated)}, as the config.json of {model.path} says"
            raise error(f"model.{name}", given, wanted)


def _check_parts_of_steps(config: TrainConfig) -> None:
    """Refuses to compare a part of a step with a whole one, and what would look at, or take, parts that
    bfloat16 weights cannot show."""
    looks, rule = config.curvature.diagnose_every, str(config.algo.step_rule["_target_"])
    if looks and not rule.endswith(".full_step"):
        raise error("curvature.diagnose_every", looks, "0 with a step rule: it compares whole steps")
    if config.model.load_dtype == "float32":
        return
    beside = "with model.load_dtype=bfloat16"
    if config.model.compute_dtype == "float32":
        raise error("model.compute_dtype", "float32", f"auto or bfloat16 {beside}")
    if not rule.endswith(".full_step"):
        raise error("algo.step_rule._target_", rule, f"capo_exp.algorithms.neutral.full_step {beside}")
    if looks:
        raise error("curvature.diagnose_every", looks, f"0 {beside}")


def _check_algorithm(config: TrainConfig) -> None:
    """Compares what the parts declare with the rest of the configuration."""
    algo = config.algo
    advantage = build.locate(algo.advantage, "algo.advantage")
    compared = f"{advantage.__name__} compares the completions of a prompt"
    if config.regime.group_size == 1 and declares(advantage, "compares_group"):
        raise error("regime.group_size", 1, f"at least 2, since {compared}")
    compares = build.part_declares(algo.token_loss, "algo.token_loss", "compares_group")
    if algo.num_minibatches > 1 and compares:
        wanted = f"1 with algo={algo.name}, whose loss compares the completions of a prompt"
        raise error("algo.num_minibatches", algo.num_minibatches, wanted)
    if algo.reference_reset_every and not build.holds_reference(algo):
        raise error("algo.reference_reset_every", algo.reference_reset_every, "0 without a KL to a reference")
    _check_samples(config)
    _check_budget(config)
    _check_pairs(config)
    demonstrated = str((config.rollout.train_engine or {}).get("_target_")).endswith(".DemonstrationRollout")
    if demonstrated and declares(advantage, "compares_group"):
        wanted = f"algo=sft regime.group_size=1 with rollout=demonstrations: {compared}, here all alike"
        raise error("algo", algo.name, wanted)


def _check_samples(config: TrainConfig) -> None:
    """Compares what the parts ask to be sampled beside a step's own completions with what is."""
    algo = config.algo
    parts = {"group_filter": algo.group_filter, "advantage": algo.advantage, "credit": algo.credit}
    asking = {
        offer: part["_target_"]
        for name, part in parts.items()
        for offer in asked(build.locate(part, f"algo.{name}"), dict.fromkeys(OFFERS))
    }
    for key, offer in (("reference_samples", "reference_rewards"), ("continuations", "state_values")):
        count = getattr(algo, key)
        paired = key == "reference_samples" and config.rollout.has_pairs  # which bring the rewards
        if offer in asking and not (count or paired):
            choices = "at least 1, or rollout=pairs" if key == "reference_samples" else "at least 1"
            raise error(f"algo.{key}", 0, f"{choices}, since {asking[offer]} asks for {offer}")
        if count and config.rollout.train_engine is not None:
            wanted = "0 with rollout.train_engine, whose completions nobody sampled"
            raise error(f"algo.{key}", count, wanted)
    if algo.continuations and not algo.shaping["_target_"].endswith(".unshaped"):
        wanted = (
            "capo_exp.algorithms.neutral.unshaped with algo.continuations, whose rewards stay as they are"
        )
        raise error("algo.shaping._target_", algo.shaping["_target_"], wanted)
    if algo.reference_samples and algo.reference_reset_every:
        wanted = "0 with algo.reference_samples, which are those of the first reference"
        raise error("algo.reference_reset_every", algo.reference_reset_every, wanted)


def _check_budget(config: TrainConfig) -> None:
    """Refuses a budget of tokens that is too small for any step, or that nothing could keep to."""
    tokens, rounds = config.algo.rollout_tokens, config.algo.max_sampling_rounds
    batch = config.regime.prompts_per_step * config.regime.group_size
    if tokens is None:
        return
    if tokens < batch:
        product = "regime.prompts_per_step x regime.group_size"
        raise error("algo.rollout_tokens", tokens, f"null, or at least {product} = {batch}, a token each")
    if rounds > 1:
        raise error("algo.max_sampling_rounds", rounds, "1 with algo.rollout_tokens, which ends the sampling")
    if config.rollout.train_engine is not None:
        wanted = "null with rollout.train_engine, whose completions nobody sampled"
        raise error("algo.rollout_tokens", tokens, wanted)


def _check_pairs(config: TrainConfig) -> None:
    algo, levels = config.algo, f"algo.pair_levels=[{','.join(config.algo.pair_levels)}]"
    if not config.rollout.has_pairs:
        if algo.pair_levels:
            raise error("rollout", config.rollout.name, f"rollout=pairs with {levels}")
        return
    if config.regime.group_size != 2:
        raise error("regime.group_size", config.regime.group_size, "2 with rollout=pairs")
    if {"inference", "step"} & {*algo.pair_levels} and algo.states["_target_"].endswith(".prompt_alone"):
        wanted = f"what says where a step begins, as capo_exp.algorithms.vineppo.step_starts, with {levels}"
        raise error("algo.states._target_", algo.states["_target_"], wanted)
