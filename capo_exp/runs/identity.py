"""Who a run is: its id, its name for people and its folder. Imports no torch.

The id stands for what changes results, and the schema says what does: a field with the metadata
`{"result": False}` does not count, and a field at its default does nothing, so it is left out. A new key with
a neutral default therefore leaves every id as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import omegaconf

from capo_exp.config.build import locate
from capo_exp.config.places import slug
from capo_exp.config.schema import VLLM_ENGINE, TrainConfig


@cache
def read_schema(schema: type = TrainConfig, prefix: str = "") -> tuple[frozenset[str], dict[str, Any]]:
    """Returns the dotted keys, and groups of keys, that change no result; and dotted key -> neutral value."""
    left_out, neutral, hints = set[str](), dict[str, Any](), get_type_hints(schema)
    for field in fields(schema):
        key = f"{prefix}{field.name}"
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if default is not MISSING and default != omegaconf.MISSING:
            neutral[key] = default
        if not field.metadata.get("result", True):
            left_out.add(key)
        elif is_dataclass(hints[field.name]):
            inner = read_schema(hints[field.name], f"{key}.")
            left_out, neutral = left_out | inner[0], neutral | inner[1]
    return frozenset(left_out), neutral


def list_engine_conditions(engine: Mapping[str, Any]) -> list[str]:
    """Returns the settings of rollout.engine that change no result, as the dataclass of rollout=vllm says."""
    if engine.get("_target_") != VLLM_ENGINE:
        return []
    settings: Any = locate(engine, "rollout.engine")
    return [field.name for field in fields(settings) if not field.metadata.get("result", True)]


def run_id(config: TrainConfig) -> str:
    """Returns 8 hex digits that are the same whenever the command asks for the same numbers."""
    canonical = json.dumps(select_results(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def select_results(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as plain values without what changes no result and what is neutral."""
    left_out, neutral = read_schema(type(config))
    left_out |= {f"rollout.engine.{name}" for name in list_engine_conditions(config.rollout.engine)}

    def counted(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for key, value in ((f"{prefix}{name}", value) for name, value in node.items()):
            if key not in left_out and (key not in neutral or value != neutral[key]):
                inner = counted(value, f"{key}.") if isinstance(value, dict) else value
                found |= {} if inner == {} and value else {key: inner}  # a group of which nothing counts
        return found

    return counted(asdict(config))


def run_name(config: TrainConfig) -> str:
    """Returns what sweeps change, and the id: `capo-tiny-arithmetic-aggressive-lr0.0001-12x8-s0-1a2b3c4d`.

    It is safe in a shell, a URL and a Hydra override.
    """
    regime = config.regime
    batch = (f"lr{regime.learning_rate:g}", f"{regime.prompts_per_step}x{regime.group_size}")
    subject = (config.algo.full_name, config.model.name, config.dataset.name, regime.name)
    return "-".join([*map(slug, (*subject, *batch, f"s{config.seed}")), run_id(config)])


def run_dir(config: TrainConfig) -> Path:
    """Returns output_dir / experiment_name / run_name; it is always two folders below output_dir."""
    return Path(config.output_dir) / slug(config.experiment_name) / run_name(config)
