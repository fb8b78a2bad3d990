"""What `python -m capo_exp.evaluate` takes, and each benchmark's configuration. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from capo_exp.cli.compose import compose_config, find_choices
from capo_exp.cli.errors import in_one_line
from capo_exp.cli.words import choose_model
from capo_exp.config.checks import check, check_tracker
from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.ranges import NAME, apply
from capo_exp.config.record import as_data, find_unnamed, read_values, refuse_place
from capo_exp.config.schema import TrainConfig, conf_dir, to_config
from capo_exp.evaluation.command import EvaluateCommand
from capo_exp.runs.files import open_regular

PROMPT_KEYS: dict[str, Any] = {
    "prompt_style": "own", "system_prompt": None, "template": "", "apply_chat_template": False,
    "examples": [],
}  # fmt: skip
"""Of `dataset`: what a model was trained to read -> what it is where a run is older than the key."""
TRAINING_KEYS = ("levels", "types")
"""Of `dataset`: what a run is trained on; an evaluation asks all, unless the command line says otherwise."""


def read_command(command: EvaluateCommand) -> EvaluateCommand:
    """Checks what the command line says, and puts the benchmarks of a suite in place of its name.

    Raises:
        ConfigError: a wrong value, nothing or too much to evaluate.
    """
    named = [command.suites.get(name, [name]) for name in command.benchmarks]
    command = replace(command, benchmarks=list(dict.fromkeys(name for names in named for name in names)))
    _check(command)
    if command.completions:
        _check_completions(command)
    return command


def _check(command: EvaluateCommand) -> None:
    subjects = {"run": command.run, "model": command.model, "completions": command.completions}
    asked = [name for name, value in subjects.items() if value]
    if len(asked) != 1:
        got = " and ".join(f"{name}={subjects[name]}" for name in asked) or "nothing to evaluate"
        raise ConfigError(f"got {got}; expected one of run=, model=, completions=")
    check_tracker(command.logger)
    known = find_choices("dataset", command.config_dir)
    for name in command.benchmarks:
        if name not in known:
            raise ConfigError(f"benchmarks={name}: unknown; {suggest(name, [*known, *command.suites])}")
    if command.model and not command.benchmarks:
        raise ConfigError(f"benchmarks: no value; {suggest('', known)}")
    if command.temperature == 0 and command.samples > 1:
        raise ConfigError(
            f"samples={command.samples}: expected 1 at temperature=0, which draws the same one each time"
        )


def _check_completions(command: EvaluateCommand) -> None:
    defaults: Any = OmegaConf.load(conf_dir() / "evaluate.yaml")
    for name, value in vars(command).items():
        if name not in ("completions", "output", "overrides", "config_dir") and value != defaults[name]:
            raise ConfigError(f"{name}={value}: expected only output and reward keys with completions=")
    for override in command.overrides:
        if not override.startswith(("reward", "plugins=")):
            raise ConfigError(f"{override}: expected only output and reward keys with completions=")


def benchmark_config(
    benchmark: str,
    overrides: Sequence[str],
    *,
    run: Mapping[str, Any] | None = None,
    model: str | None = None,
    config_dir: str | None = None,
) -> TrainConfig:
    """The main configuration for one benchmark, with the model, engine and prompt style of a run.

    A run's own dataset is evaluated as the run has it; another benchmark keeps its own data, lengths and
    reward, and takes the run's prompt style, unless `prompt=` says otherwise.

    Args:
        benchmark: name of conf/dataset.
        overrides: of the command line; they win.
        run: config.yaml of the run.
        model: name of conf/model, a directory, or a hub id.
        config_dir: folder with a user's own YAML files.

    Raises:
        ConfigError: what `python -m capo_exp` would say.
    """
    chosen = {override.partition("=")[0] for override in overrides}
    first = [f"dataset={benchmark}", "regime.learning_rate=0"]  # nothing is trained
    first += choose_model(f"model={model}", config_dir) if model else []
    if run and "rollout" not in chosen and run["rollout"]["name"] in find_choices("rollout", config_dir):
        first.append(f"rollout={run['rollout']['name']}")
    with in_one_line():
        cfg = compose_config([*first, *overrides], config_dir=config_dir)
        values = _inherited(run, benchmark, chosen, cfg.rollout.engine, overrides) if run else {}
        for key, value in values.items():
            OmegaConf.update(cfg, key, as_data(value), merge=False, force_add=True)
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if "." in override.key_or_group:  # a group's choice is not a value
                OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    config = to_config(cfg)
    check(config)
    _ = config.model.architecture  # refuses a model that cannot be read
    return config


def _inherited(
    run: Mapping[str, Any],
    benchmark: str,
    chosen: set[str],
    engine: Mapping[str, Any],
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Dotted keys of the run that hold for the benchmark, unless the command line chose their group.

    Raises:
        ConfigError: the benchmark is the run's own, and its data stand where only the record says.
    """
    found = {f"model.{key}": value for key, value in run["model"].items() if "model" not in chosen}
    if "rollout" not in chosen:
        same = {k: v for k, v in run["rollout"]["engine"].items() if k in engine and k != "max_model_len"}
        found |= {f"rollout.engine.{key}": value for key, value in same.items()}
    dataset = dict(run["dataset"])
    prompt = {key: dataset.get(key, neutral) for key, neutral in PROMPT_KEYS.items()}
    if benchmark != dataset["name"]:
        dataset = prompt
    else:
        for key, value in find_unnamed(dataset, overrides, "dataset"):
            raise refuse_place(key, value)
        dataset = {key: value for key, value in (dataset | prompt).items() if key not in TRAINING_KEYS}
        if "reward" not in chosen:
            found["reward.verifier"] = run["reward"]["verifier"]
    if "prompt" in chosen:
        dataset = {key: value for key, value in dataset.items() if key not in PROMPT_KEYS}
    unnamed = {key for key, _ in find_unnamed({key: run[key] for key in ("model", "rollout")}, overrides)}
    kept = {key: value for key, value in found.items() if key not in unnamed}
    return kept | {f"dataset.{key}": value for key, value in dataset.items()}


def run_config(directory: Path) -> dict[str, Any]:
    """config.yaml of a run, as plain values.

    Raises:
        ConfigError: there is none, or it is no configuration of a run.
    """
    try:
        with open_regular(directory / "config.yaml") as file:
            text = file.read().decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"run={directory}: no readable config.yaml ({error}); expected a run") from error
    plain = read_values(text, f"run={directory}")
    for group in ("model", "dataset", "rollout", "reward"):
        if not isinstance(plain.get(group), dict):
            raise ConfigError(
                f"run={directory}: {group} is no group of keys in its config.yaml; expected a run's"
            )
        if strange := [key for key in plain[group] if not re.fullmatch(r"\w+", str(key))]:
            raise ConfigError(f"run={directory}: {group} has the key {strange[0]!r}; expected a run's")
        apply(NAME, f"{group}.name", str(plain[group].get("name", "")))
    for key, group in (("engine", "rollout"), ("verifier", "reward"), ("source", "dataset")):
        if not isinstance(plain[group].get(key), dict):
            raise ConfigError(
                f"run={directory}: {group}.{key} is no part in its config.yaml; expected a run's"
            )
    return plain
