"""`python -m capo_exp.evaluate`: a run's checkpoint, a model, or completions on disk -> scores."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_exp.cli import front
from capo_exp.cli.compose import find_choices
from capo_exp.cli.evaluate_config import benchmark_config, read_command, run_config
from capo_exp.config.build import build_part
from capo_exp.config.errors import ConfigError, RunFailed, same_command
from capo_exp.config.places import quoted, slug
from capo_exp.config.record import find_unnamed, refuse_place
from capo_exp.config.schema import TrainConfig
from capo_exp.evaluation.command import UNSEEN, EvaluateCommand, WeightSet, tell
from capo_exp.runs import metrics as names
from capo_exp.runs.checkpoint import find_damage
from capo_exp.runs.files import find_disk_error, list_checkpoints
from capo_exp.sweep.table import console

if TYPE_CHECKING:
    from capo_exp.evaluation.table import BenchmarkScore

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
OTHERS = ("model.", "dataset.", "prompt", "device", "rollout", "reward", "plugins")
"""Beginnings of the keys of the training configuration that an evaluation depends on."""


@dataclass(frozen=True)
class EvaluationJob:
    """A run or a model, with all that is to be done for it."""

    title: str
    configs: list[TrainConfig]
    """One a benchmark."""
    targets: list[WeightSet]
    trained_on: dict[str, Any] | None
    """Its dataset; None if it is not known, or stands where only the record says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return front.run_command(show_scores, LINE, arguments)


def _usage() -> str:
    return USAGE.replace("{benchmarks}", ", ".join(find_choices("dataset")))


LINE = front.CommandLine("evaluate", EvaluateCommand, _usage, others=OTHERS)


def show_scores(given: EvaluateCommand) -> int:
    """Evaluates what the command names, shows the scores and returns the exit status."""
    command = read_command(given)
    kept = f"parts that are done are kept, and {same_command(command.overwrite)} goes on from there"
    try:
        if command.completions is not None:
            _show_stored(Path(command.completions), command)
        else:
            _show_jobs(command)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; {kept}\n")
        return 130
    except RunFailed as failed:
        raise RunFailed(f"{failed}; {kept}") from failed
    except OSError as error:
        if find_disk_error(error) is None:
            raise
        sys.stderr.write(f"{error}; {kept}\n")
        return 1
    return 0


def find_jobs(command: EvaluateCommand) -> list[EvaluationJob]:
    """Returns the runs or the model that the command names, checked before anything is sampled."""
    if command.output is not None:
        front.make_folder(Path(command.output))
    return [_model_job(command)] if command.model else _run_jobs(command)


def evaluate_job(command: EvaluateCommand, job: EvaluationJob) -> list["BenchmarkScore"]:
    """Returns the scores of one run or model, those of its checkpoints in turn."""
    from capo_exp.evaluation.subject import evaluate_targets  # torch, so only now

    results = []
    for result in evaluate_targets(command, job.configs, job.targets, trained_on=job.trained_on):
        results.append(result)
        if len(results) % len(job.configs) == 0 and job.targets[0].step is not None:  # a run's
            _write_test_rows(job.targets[0].root, results)
    if not results:
        raise RunFailed(f"{job.title}: none of its checkpoints is left")
    return results


def _show_jobs(command: EvaluateCommand) -> None:
    from capo_exp.evaluation.table import results_table

    jobs = find_jobs(command)
    for job in jobs:
        results = evaluate_job(command, job)
        if len(jobs) > 1:
            console().print(job.title, style="bold", soft_wrap=True)
        console().print(results_table(results))
        console().print(f"files: {job.targets[0].root}", soft_wrap=True)


def _show_stored(path: Path, command: EvaluateCommand) -> None:
    from capo_exp.evaluation.stored import score_stored, write_stored
    from capo_exp.evaluation.table import stored_table

    if command.output is not None:
        front.make_folder(Path(command.output))
    chosen = any(override.startswith("reward=") for override in command.overrides)
    reward = [] if chosen else ["reward=math_verify", "reward.verifier.style=auto"]
    config = benchmark_config("arithmetic", [*reward, *command.overrides], config_dir=command.config_dir)
    with build_part(config.reward.verifier, key="reward.verifier")() as verifier:
        stored = score_stored(path, verifier)
    console().print(stored_table(stored.groups))
    if command.output is not None:
        write_stored(Path(command.output), path, stored, config.reward.verifier)
        console().print(f"files: {command.output}", soft_wrap=True)


def _model_job(command: EvaluateCommand) -> EvaluationJob:
    assert command.model is not None
    configs = [
        benchmark_config(name, command.overrides, model=command.model, config_dir=command.config_dir)
        for name in command.benchmarks
    ]
    root = Path(command.output or "outputs/evaluations")
    label = slug(Path(command.model).name)
    return EvaluationJob(command.model, configs, [WeightSet(label, None, None, None, root)], None)


def _run_jobs(command: EvaluateCommand) -> list[EvaluationJob]:
    """One a run."""
    from capo_exp.runs.read import find_runs

    jobs = []
    for directory in find_runs(command.run):
        run = run_config(directory)
        unnamed = dict(find_unnamed(run, command.overrides))
        base = command.base and "model.path" not in unnamed
        targets = _targets(replace(command, base=base), directory, run)
        own = [] if base else [f"model.path={quoted(targets[0].weights)}", "model.revision=null"]
        names = command.benchmarks or [run["dataset"]["name"]]
        overrides = [*own, *command.overrides]
        configs = [benchmark_config(n, overrides, run=run, config_dir=command.config_dir) for n in names]
        for key, value in unnamed.items():
            if key.startswith(("model.", "rollout.", "dataset.")):
                tell(f"{directory.name}: left out: {refuse_place(key, value)}")
        places = find_unnamed(run, command.overrides, replaced=False)  # the record's own values
        hidden = [key for key, _ in places if key.startswith("dataset.")]
        if hidden:
            tell(f"{directory.name}: {UNSEEN}: {hidden[0]} stands in the record only")
        jobs.append(EvaluationJob(directory.name, configs, targets, None if hidden else run["dataset"]))
    return jobs


def _targets(command: EvaluateCommand, directory: Path, run: Mapping[str, Any]) -> list[WeightSet]:
    """The checkpoints that the command asks for, and the base model.

    Raises:
        ConfigError: they are not there.
    """
    from capo_exp.runs.read import load_run

    found, logged = list_checkpoints(directory), load_run(directory)  # in this order while training goes on
    owner = logged.record.get("run_id")
    while command.checkpoint == "last" and found and (damage := find_damage(found[max(found)], owner)):
        tell(f"{found.pop(max(found))} is not used: {damage}")
    if not found:
        raise ConfigError(f"run={directory}: no checkpoint there; expected a run that has saved one")
    steps = sorted(found) if command.checkpoint == "all" else [max(found)]
    if command.checkpoint.isdecimal():
        steps = [int(command.checkpoint)]
    if not set(steps) <= set(found):
        known = ", ".join(map(str, sorted(found)))
        raise ConfigError(f"checkpoint={command.checkpoint}: expected last, all, or one of the steps {known}")
    for step in steps:
        damage = find_damage(found[step], owner) if command.checkpoint != "last" else None
        if damage and found[step].is_dir():  # else training has just removed it
            raise ConfigError(
                f"checkpoint={command.checkpoint}: {found[step]}: {damage}; expected a whole one"
            )
    here = directory.resolve()
    root = Path(command.output) / here.name if command.output else directory / "evaluations"
    if root.is_symlink():
        raise ConfigError(f"{root} is a link, which is not followed; expected output=DIR beside it")
    shared = Path(command.output) if command.output else here.parent.parent / "evaluations"
    name = str(run["model"]["name"])
    label = f"base {name}" if name in (found[step].name for step in steps) else name
    base = [WeightSet(label, None, 0, 0, shared)] if command.base else []
    rows = [row for row in logged.metrics if {names.STEP, names.COMPLETIONS} <= row.keys()]
    drawn = {int(row[names.STEP]): row[names.COMPLETIONS] for row in rows}
    return [*(WeightSet(found[step].name, found[step], step, drawn.get(step), root) for step in steps), *base]


def _write_test_rows(root: Path, results: Sequence[Any]) -> None:
    from capo_exp.evaluation.table import test_rows
    from capo_exp.runs.files import write_atomic
    from capo_exp.runs.parse import scan_jsonl

    path = root / "test.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    before, damaged = scan_jsonl(path)
    for text in damaged:
        tell(f"left out: {text}")
    rows = test_rows(results, before)
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))
