"""`python -m capo_exp.evaluate`: a run's checkpoint, a model, or completions on disk -> scores."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from capo_exp.cli.evaluate_config import Command, benchmark_config, help_text, parse, run_config
from capo_exp.config.build import build_part
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.evaluation.target import Target
from capo_exp.runs.files import find_disk_error
from capo_exp.sweep.job import report

KEPT = "parts that are done are kept, and the same command goes on from there"
WIDTH = 160
"""Columns where the output is not a terminal."""


@dataclass(frozen=True)
class Job:
    """A run or a model, with all that is to be done for it."""

    title: str
    configs: list[TrainConfig]
    """One a benchmark."""
    targets: list[Target]
    run: dict[str, Any] | None
    """Its config.yaml; None for a model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(given):
        sys.stdout.write(help_text())
        return 0
    try:
        evaluate(*parse(given))
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; {KEPT}\n")
        return 130
    except OSError as error:
        if find_disk_error(error) is None:
            return report(error)
        sys.stderr.write(f"{error}; {KEPT}\n")
        return 1
    except Exception as error:
        return report(error)
    return 0


def evaluate(command: Command, overrides: Sequence[str]) -> None:
    """Evaluates what the command names and shows the scores."""
    if command.output is not None:
        _make_folder(Path(command.output))
    if command.completions is not None:
        _evaluate_stored(Path(command.completions), command.output, overrides)
        return
    jobs = [_model_job(command, overrides)] if command.model else _run_jobs(command, overrides)
    for job in jobs:
        _evaluate_job(command, job, name_it=len(jobs) > 1)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={path}: no folder can be made there ({error.strerror})") from error


def _evaluate_stored(path: Path, output: str | None, overrides: Sequence[str]) -> None:
    from capo_exp.evaluation.stored import score_stored, write_stored
    from capo_exp.evaluation.table import stored_table

    chosen = any(override.startswith("reward=") for override in overrides)
    reward = [] if chosen else ["reward=math_verify", "reward.verifier.style=auto"]
    config = benchmark_config("arithmetic", [*reward, *overrides])
    with build_part(config.reward.verifier, key="reward.verifier")() as verifier:
        stored = score_stored(path, verifier)
    console().print(stored_table(stored.groups))
    if output is not None:
        write_stored(Path(output), path, stored, config.reward.verifier)
        console().print(f"files: {output}", soft_wrap=True)


def _model_job(command: Command, overrides: Sequence[str]) -> Job:
    assert command.model is not None
    configs = [benchmark_config(name, overrides, model=command.model) for name in command.benchmarks]
    root = Path(command.output or "outputs/evaluations")
    label = Path(command.model).name or "model"
    return Job(command.model, configs, [Target(label, None, None, None, root)], None)


def _run_jobs(command: Command, overrides: Sequence[str]) -> list[Job]:
    """One a run, checked before anything is sampled."""
    from capo_exp.runs.read import find_runs

    jobs = []
    for directory in find_runs(command.run):
        run = run_config(directory)
        targets = _targets(command, directory, run)
        own = [] if command.base else [f"model.path={quoted(targets[0].weights)}", "model.revision=null"]
        names = command.benchmarks or [run["dataset"]["name"]]
        configs = [benchmark_config(name, [*own, *overrides], run=run) for name in names]
        jobs.append(Job(directory.name, configs, targets, run))
    return jobs


def quoted(path: Path | None) -> str:
    """As Hydra's grammar wants a path with spaces, commas and the like."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def _targets(command: Command, directory: Path, run: Mapping[str, Any]) -> list[Target]:
    """The checkpoints that the command asks for, and the base model.

    Raises:
        ConfigError: they are not there.
    """
    folders = (directory / "checkpoints").glob("step_*")
    found = {int(path.name[5:]): path for path in folders if path.name[5:].isdecimal()}
    if not found:
        raise ConfigError(f"run={directory}: no checkpoint there; expected a run that has saved one")
    steps = sorted(found) if command.checkpoint == "all" else [max(found)]
    if command.checkpoint.isdecimal():
        steps = [int(command.checkpoint)]
    if not set(steps) <= set(found):
        known = ", ".join(map(str, sorted(found)))
        raise ConfigError(f"checkpoint={command.checkpoint}: expected last, all, or one of the steps {known}")
    here = directory.resolve()
    root = Path(command.output) / here.name if command.output else directory / "evaluations"
    shared = Path(command.output) if command.output else here.parents[1] / "evaluations"
    base = [Target(str(run["model"]["name"]), None, 0, 0, shared)] if command.base else []
    drawn = _completions(directory)
    return [*(Target(found[step].name, found[step], step, drawn.get(step), root) for step in steps), *base]


def _completions(directory: Path) -> dict[int, float]:
    """Rollout step -> completions that training had sampled."""
    from capo_exp.runs.read import load_run

    rows = load_run(directory).metrics
    return {int(row["counter/rollout_step"]): row["counter/completions"] for row in rows}


def _evaluate_job(command: Command, job: Job, *, name_it: bool) -> None:
    from capo_exp.evaluation.subject import evaluate_targets  # torch, so only now
    from capo_exp.evaluation.table import results_table

    results = []
    for result in evaluate_targets(command, job.configs, job.targets, trained_on=job.run, tell=_tell):
        results.append(result)
        if len(results) % len(job.configs) == 0 and job.run is not None:
            _write_test_rows(job.targets[0].root, results)
    if name_it:
        console().print(job.title, style="bold", soft_wrap=True)
    console().print(results_table(results))
    console().print(f"files: {job.targets[0].root}", soft_wrap=True)


def _write_test_rows(root: Path, results: Sequence[Any]) -> None:
    from capo_exp.evaluation.table import test_rows
    from capo_exp.runs.files import write_atomic
    from capo_exp.runs.read import read_jsonl

    path = root / "test.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = test_rows(results, read_jsonl(path))
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def console() -> Console:
    """A terminal's width, or room enough in a log file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def interrupt(*_: object) -> None:
    """What a scheduler's SIGTERM does: the same as Ctrl-C."""
    raise KeyboardInterrupt
