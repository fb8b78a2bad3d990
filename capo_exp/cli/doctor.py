"""`python -m capo_exp.doctor`: can this machine run what the configuration asks for?

Runs the checks of doctor_checks.py one after another and prints a table: what was seen, and what helps. The
checks import torch, not this module, so that --help and a wrong configuration answer at once.
"""

import inspect
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text
from yaml import YAMLError

from capo_exp.cli.compose import choose_by_slash, condense
from capo_exp.cli.doctor_checks import (
    CheckFailed,
    Result,
    compare_disk,
    compare_log_probs,
    compare_memory,
    compare_versions,
    find_device,
    grade_answers,
    load_model,
    read_data,
    resolve_wandb,
    round_trip,
    start_engine,
    transfer_weights,
)
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.sweep.job import FULL_ERROR, report

USAGE = """\
python -m capo_exp.doctor [key=value ...]

Checks whether this machine can run `python -m capo_exp` with the same overrides: versions, device, memory,
model, data, engine, weight transfer, log-probs, reward, disk, W&B, resume. Keeps nothing of what it writes.
Exit status: 0 = no check failed, 1 = one did, 2 = the configuration is wrong; HYDRA_FULL_ERROR=1 says where.
"""


@dataclass(frozen=True)
class Check:
    """One line of the table to come."""

    name: str
    run: Callable[..., Result]
    """Its parameters are what it needs: the configuration, the exit stack, or what earlier checks made."""
    remedy: str
    """For a failure that names none itself."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    result: str
    """pass | FAIL | n.a. | not run."""
    seen: str
    remedy: str = ""


CHECKS = (
    Check("versions", compare_versions, "pip install -e ."),
    Check("device", find_device, "device=auto"),
    Check(
        "memory",
        compare_memory,
        "lower model.micro_batch_size or model.logits_chunk_tokens; model.gradient_checkpointing=true; "
        "with rollout=vllm lower rollout.engine.gpu_memory_utilization or kv_cache_gib",
    ),
    Check("model", load_model, "model.path with whole safetensors weights and their tokenizer"),
    Check("data", read_data, "dataset.path, dataset.max_prompt_tokens"),
    Check("engine", start_engine, "what its log says; rollout=hf needs no engine of its own"),
    Check("weight transfer", transfer_weights, "another rollout.engine.weight_transfer; rollout=hf"),
    Check(
        "log-probs",
        compare_log_probs,
        "rollout.engine.dtype as model.compute_dtype; rollout/correction=token_mask weights what is left",
    ),
    Check("reward", grade_answers, "reward=exact or reward=math_verify, as the dataset's answers need"),
    Check("disk space", compare_disk, "lower checkpoint.keep; output_dir on a larger disk"),
    Check("W&B", resolve_wandb, "wandb login; logger.wandb_mode=offline; logger=files"),
    Check("resume", round_trip, "output_dir on another disk; a run would not go on as it began"),
)


def main() -> None:
    """Runs the command line; always ends in SystemExit."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(USAGE)
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which closes the engine
    try:
        rows = examine(configure(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        raise SystemExit(report(error)) from None
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table(rows))
    raise SystemExit(0 if all(row.result in ("pass", "n.a.") for row in rows) else 1)


def configure(arguments: Sequence[str]) -> TrainConfig:
    """The checked configuration of one run; writes nothing.

    Raises:
        ConfigError: with what `python -m capo_exp` would say; also for a flag, and for a sweep.
    """
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise ConfigError(f"{flags[0]}: expected key=value only, since the doctor examines one run")
    register()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = compose("config", [choose_by_slash(a) for a in arguments], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise (error if FULL_ERROR else ConfigError(condense(error))) from None
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
    swept = hydra.sweeper.params or {} if hydra.mode == RunMode.MULTIRUN else {}
    for key, values in swept.items():
        if not any(argument.startswith(f"{key}=") for argument in arguments):
            raise ConfigError(f"{key}={values}: expected one of them, since the doctor examines one run")
    config = to_config(cfg)
    check(config)
    return config


def examine(config: TrainConfig) -> list[Row]:
    """Runs each check that has what it needs. The engine is closed at the end, whatever happens."""
    rows: list[Row] = []
    with ExitStack() as stack:
        made: dict[str, Any] = {"config": config, "stack": stack}
        for each in CHECKS:
            needs = inspect.signature(each.run).parameters
            if missing := [name.replace("_", " ") for name in needs if name not in made]:
                rows.append(Row(each.name, "not run", f"needs: {', '.join(missing)}"))
                continue
            sys.stderr.write(f"checking {each.name}\n")
            try:
                result = each.run(**{name: made[name] for name in needs})
            except Exception as error:
                rows.append(_failure(each, error))
            else:
                made |= result.makes
                rows.append(Row(each.name, "pass" if result.applies else "n.a.", result.seen))
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a terminal or a log file."""
    out = Table("check", "result", "what was seen", "remedy")
    for row in rows:
        style = "bold red" if row.result == "FAIL" else ""
        out.add_row(row.check, Text(row.result, style), Text(row.seen), Text(row.remedy))
    return out


def _failure(check: Check, error: Exception) -> Row:
    if FULL_ERROR:
        traceback.print_exception(error)
    if isinstance(error, CheckFailed | ConfigError | RunFailed):
        own = error.remedy if isinstance(error, CheckFailed) else ""
        return Row(check.name, "FAIL", str(error), own or check.remedy)
    first_line = str(error).partition("\n")[0]
    return Row(check.name, "FAIL", f"{type(error).__name__}: {first_line}", check.remedy)
