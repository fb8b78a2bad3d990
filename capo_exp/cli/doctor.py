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

from rich.table import Table
from rich.text import Text

from capo_exp.cli import doctor_checks as checks
from capo_exp.cli import front
from capo_exp.cli.doctor_checks import CheckFailed, Result
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.config.schema import TrainConfig
from capo_exp.sweep.job import full_error
from capo_exp.sweep.table import console

USAGE = """\
python -m capo_exp.doctor [key=value ...]

Checks whether this machine can run `python -m capo_exp` with the same overrides: versions, device, memory,
model, data, engine, weight transfer, log-probs, reward, disk, W&B, resume. Keeps nothing of what it writes.
Exit status: 0 = no check failed, 1 = one did, 2 = the configuration is wrong; HYDRA_FULL_ERROR=1 says where.
"""


@dataclass(frozen=True)
class Check:
    """A check: one line of the table to come."""

    name: str
    run: Callable[..., Result]
    """Its parameters are what it needs: the configuration, the exit stack, or what earlier checks made."""
    remedy: str
    """For a failure that names none itself."""


@dataclass(frozen=True)
class Row:
    """What became of a check: one line of the table."""

    check: str
    result: str
    """pass | FAIL | n.a. | not run."""
    seen: str
    remedy: str = ""


CHECKS = (
    Check("versions", checks.compare_versions, "pip install -e ."),
    Check("device", checks.show_device, "device=auto"),
    Check(
        "memory",
        checks.compare_memory,
        "lower model.micro_batch_size or model.logits_chunk_tokens; model.gradient_checkpointing=true; "
        "with rollout=vllm lower rollout.engine.gpu_memory_utilization or kv_cache_gib",
    ),
    Check("model", checks.read_model, "model.path with whole safetensors weights and their tokenizer"),
    Check("data", checks.read_data, "dataset.path, dataset.max_prompt_tokens"),
    Check("engine", checks.start_engine, "what its log says; rollout=hf needs no engine of its own"),
    Check("weight transfer", checks.transfer_weights, "another rollout.engine.weight_transfer; rollout=hf"),
    Check(
        "log-probs",
        checks.compare_log_probs,
        "rollout.engine.dtype as model.compute_dtype; rollout/correction=token_mask weights what is left",
    ),
    Check(
        "reward", checks.grade_answers, "reward=exact or reward=math_verify, as the dataset's answers need"
    ),
    Check("disk space", checks.compare_disk, "lower checkpoint.keep; output_dir on a larger disk"),
    Check("W&B", checks.resolve_wandb, "wandb login; logger.wandb_mode=offline; logger=files"),
    Check("resume", checks.round_trip, "output_dir on another disk; a run would not go on as it began"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which closes the engine
    return front.run_command(show_checks, front.CommandLine("config", TrainConfig, lambda: USAGE), arguments)


def show_checks(config: TrainConfig) -> int:
    """Examines this machine and prints the table; returns 1 if a check failed."""
    check(config)
    rows = examine(config)
    console().print(checks_table(rows))
    return 0 if all(row.result in ("pass", "n.a.") for row in rows) else 1


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


def checks_table(rows: Sequence[Row]) -> Table:
    """Returns the rows as a table for a terminal or a log file."""
    out = Table("check", "result", "what was seen", "remedy")
    for row in rows:
        style = "bold red" if row.result == "FAIL" else ""
        out.add_row(row.check, Text(row.result, style), Text(row.seen), Text(row.remedy))
    return out


def _failure(check: Check, error: Exception) -> Row:
    if full_error():
        traceback.print_exception(error)
    if isinstance(error, CheckFailed | ConfigError | RunFailed):
        own = error.remedy if isinstance(error, CheckFailed) else ""
        return Row(check.name, "FAIL", str(error), own or check.remedy)
    first_line = str(error).partition("\n")[0]
    return Row(check.name, "FAIL", f"{type(error).__name__}: {first_line}", check.remedy)
