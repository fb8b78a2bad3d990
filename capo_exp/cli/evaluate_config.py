"""The command line of `python -m capo_exp.evaluate`, and each benchmark's configuration. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from capo_exp.cli.compose import FULL_ERROR, choose_by_slash, condense
from capo_exp.cli.values import entries, typed
from capo_exp.config.build import check_parts
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.schema import ARCHITECTURE, TrainConfig, conf_dir, register, to_config
from capo_exp.evaluation.target import Command

USAGE = """\
python -m capo_exp.evaluate run=DIR [benchmarks=math500,gsm8k samples=16 ...]
python -m capo_exp.evaluate model=NAME_OR_PATH benchmarks=math500
python -m capo_exp.evaluate completions=FILE.parquet

Scores of a run's checkpoint, of a model, or of completions on disk: avg@n, pass@k, maj@k with 95 % intervals
over problems. What is done is kept: the same command goes on, and then only shows. Keys and their defaults:

{keys}
Benchmarks: {benchmarks}
Exit status: 0, 1 = the engine or the disk failed, 2 = wrong input, 130 = interrupted.
"""
PROMPT_KEYS: dict[str, Any] = {
    "prompt_style": "own", "system_prompt": None, "template": "", "apply_chat_template": False,
    "examples": [],
}  # fmt: skip
"""Of `dataset`: what a model was trained to read -> what it is where a run is older than the key."""
SETTABLE = ("model", "prompt", "device", "rollout", "reward", "dataset")
"""Keys and groups of the main configuration that an evaluation depends on."""
TRAINING_KEYS = ("levels", "types")
"""Of `dataset`: what a run is trained on; an evaluation asks all, unless the command line says otherwise."""
LISTS = ("run", "benchmarks")


def parse(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Splits the arguments into the command's own and overrides of the main configuration.

    Raises:
        ConfigError: not key=value, an unknown key, a wrong value, nothing or too much to evaluate.
    """
    own, overrides = [item.name for item in fields(Command) if item.name != "suites"], []
    given: dict[str, Any] = dict(OmegaConf.to_container(OmegaConf.load(conf_dir() / "evaluate.yaml")))  # pyright: ignore
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: expected key=value, with one of {', '.join(own)}")
        if key in own:
            given[key] = entries(value) if key in LISTS else None if value in ("null", "") else value
        elif key.split(".")[0].split("/")[0] in SETTABLE and key != "dataset":
            overrides.append(choose_by_slash(argument))
        else:
            known = suggest(key, [*own, *(f"{name}.*" for name in SETTABLE)])
            raise ConfigError(f"{argument}: no key of an evaluation; {known}")
    command = typed(Command, given, "command line")
    named = [command.suites.get(name, [name]) for name in command.benchmarks]
    command = replace(command, benchmarks=list(dict.fromkeys(name for names in named for name in names)))
    _check(command)
    if command.completions:
        for argument in arguments:
            if not argument.startswith(("completions=", "output=", "reward")):
                raise ConfigError(f"{argument}: expected only output and reward keys with completions=")
    return command, overrides


def _check(command: Command) -> None:
    subjects = {"run": command.run, "model": command.model, "completions": command.completions}
    asked = [name for name, value in subjects.items() if value]
    if len(asked) != 1:
        got = " and ".join(f"{name}={subjects[name]}" for name in asked) or "nothing to evaluate"
        raise ConfigError(f"got {got}; expected one of run=, model=, completions=")
    known = benchmark_names()
    for name in command.benchmarks:
        if name not in known:
            raise ConfigError(f"benchmarks={name}: unknown; {suggest(name, [*known, *command.suites])}")
    if command.model and not command.benchmarks:
        raise ConfigError(f"benchmarks: no value; {suggest('', known)}")
    for name, least in (("samples", 1), ("problems_per_part", 1), ("top_k", 0), ("seed", 0)):
        if getattr(command, name) < least:
            raise ConfigError(f"{name}={getattr(command, name)}: expected at least {least}")
    if not 0 <= command.temperature < inf:
        raise ConfigError(f"temperature={command.temperature}: expected a number of at least 0")
    if command.num_problems is not None and command.num_problems < 1:
        raise ConfigError(f"num_problems={command.num_problems}: expected at least 1, or null")
    if not 0 < command.top_p <= 1:
        raise ConfigError(f"top_p={command.top_p}: expected a number above 0 up to 1")
    if command.temperature == 0 and command.samples > 1:
        raise ConfigError(
            f"samples={command.samples}: expected 1 at temperature=0, which draws the same one each time"
        )
    if command.checkpoint not in ("last", "all") and not command.checkpoint.isdecimal():
        raise ConfigError(f"checkpoint={command.checkpoint}: expected last, all or a step")


def benchmark_names() -> list[str]:
    """What conf/dataset has."""
    return sorted(path.stem for path in (conf_dir() / "dataset").glob("*.yaml"))


def help_text() -> str:
    """Usage, with the defaults as conf/evaluate.yaml has them."""
    lines = (conf_dir() / "evaluate.yaml").read_text(encoding="utf-8").splitlines()
    keys = "".join(f"  {line}\n" for line in lines if not line.startswith("#"))
    return USAGE.format(keys=keys, benchmarks=", ".join(benchmark_names()))


def benchmark_config(
    benchmark: str,
    overrides: Sequence[str],
    *,
    run: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> TrainConfig:
    """The main configuration for one benchmark, with the model, engine and prompt style of a run.

    A run's own dataset is evaluated as the run has it; another benchmark keeps its own data, lengths and
    reward, and takes the run's prompt style, unless `prompt=` says otherwise.

    Args:
        benchmark: name of conf/dataset.
        overrides: of the command line; they win.
        run: config.yaml of the run.
        model: name of conf/model, a directory, or a hub id.

    Raises:
        ConfigError: what `python -m capo_exp` would say.
    """
    chosen = {override.partition("=")[0] for override in overrides}
    named = model is not None and (conf_dir() / "model" / f"{model}.yaml").exists()
    first = [f"dataset={benchmark}"] + ([f"model={model}"] if named else [])
    if (
        run
        and "rollout" not in chosen
        and (conf_dir() / "rollout" / f"{run['rollout']['name']}.yaml").exists()
    ):
        first.append(f"rollout={run['rollout']['name']}")
    register()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = compose("config", [*first, *overrides])
        values = _inherited(run, benchmark, chosen, cfg.rollout.engine) if run else {}
        values |= _described(model, cfg.model.revision) if model and not named else {}
        for key, value in values.items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if "." in override.key_or_group:  # a group's choice is not a value
                OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise (error if FULL_ERROR else ConfigError(condense(error))) from None
    config = to_config(cfg)
    check(config)
    check_parts(config)
    return config


def _inherited(
    run: Mapping[str, Any], benchmark: str, chosen: set[str], engine: Mapping[str, Any]
) -> dict[str, Any]:
    """Dotted keys of the run that hold for the benchmark, unless the command line chose their group."""
    found = {f"model.{key}": value for key, value in run["model"].items() if "model" not in chosen}
    if "rollout" not in chosen:
        same = {k: v for k, v in run["rollout"]["engine"].items() if k in engine and k != "max_model_len"}
        found |= {f"rollout.engine.{key}": value for key, value in same.items()}
    dataset = dict(run["dataset"])
    prompt = {key: dataset.get(key, neutral) for key, neutral in PROMPT_KEYS.items()}
    if benchmark != dataset["name"]:
        dataset = prompt
    else:
        dataset = {key: value for key, value in (dataset | prompt).items() if key not in TRAINING_KEYS}
        if "reward" not in chosen:
            found["reward.verifier"] = run["reward"]["verifier"]
    if "prompt" in chosen:
        dataset = {key: value for key, value in dataset.items() if key not in PROMPT_KEYS}
    return found | {f"dataset.{key}": value for key, value in dataset.items()}


def _described(path: str, revision: str | None) -> dict[str, Any]:
    """Dotted keys of a model that has no YAML, from its own config.json."""
    from transformers import AutoConfig

    try:
        facts = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        known = ", ".join(sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml")))
        wanted = f"expected a directory with a model, a hub id, or one of {known}"
        raise ConfigError(f"model={path}: {wanted} ({reason})") from error
    stated = {key: getattr(facts, key, None) for key in ARCHITECTURE}
    return {
        "model.name": Path(path).name,
        "model.path": path,
        "model.revision": revision,
        **{f"model.{key}": value for key, value in stated.items() if value is not None},
    }


def run_config(directory: Path) -> dict[str, Any]:
    """config.yaml of a run, as plain values.

    Raises:
        ConfigError: there is none, or it is no configuration of a run.
    """
    path = directory / "config.yaml"
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError) as error:
        raise ConfigError(f"run={directory}: no readable config.yaml ({error}); expected a run") from error
    if not isinstance(plain, dict) or not {"model", "dataset", "rollout", "reward"} <= set(plain):
        raise ConfigError(
            f"run={directory}: config.yaml without model, dataset, rollout, reward; expected a run's"
        )
    return {str(key): value for key, value in plain.items()}
