"""The harness from Python: what `python -m capo_exp` does, and the tables of what runs left. No torch until a
run trains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_exp.cli.compose import compose_run
from capo_exp.cli.errors import in_one_line
from capo_exp.cli.evaluate import LINE, evaluate_job, find_jobs
from capo_exp.cli.evaluate_config import read_command
from capo_exp.cli.front import argv, compose_command, draw_run
from capo_exp.cli.words import as_overrides, split_flags
from capo_exp.config.errors import ConfigError, error
from capo_exp.config.schema import to_config
from capo_exp.runs.identity import run_dir
from capo_exp.runs.read import LoggedRow, LoggedRun, find_runs, load_completions, load_run
from capo_exp.sweep.job import execute

if TYPE_CHECKING:
    import pyarrow as pa

    from capo_exp.evaluation.table import BenchmarkScore


def train(*overrides: str, config_dir: str | None = None) -> LoggedRun:
    """Does what `python -m capo_exp OVERRIDES` does, for one run, and returns what it left.

    A run that was interrupted goes on, and one that has finished is only read.

    Args:
        overrides: as on the command line, such as "algo=capo", "num_steps=20", "plugins=[mypackage]".
        config_dir: folder with YAML files of your own, as --config-dir.

    Raises:
        ConfigError: the configuration is wrong, or is a sweep; nothing was written.
        RunFailed: the run could not go on; its message says where the same call does.
        KeyboardInterrupt: after a signal, once the step is done and saved.
    """
    folder = [f"--config-dir={config_dir}"] if config_dir else []
    split_flags([*overrides, *folder], ("--config-dir",))
    with argv(overrides), in_one_line():
        config = to_config(compose_run(as_overrides(overrides, config_dir), config_dir=config_dir))
    execute(config, draw_run)
    return load_run(run_dir(config))


def evaluate(*overrides: str, config_dir: str | None = None) -> list["BenchmarkScore"]:
    """Does what `python -m capo_exp.evaluate OVERRIDES` does with runs or a model, and returns the scores.

    What was evaluated before is only read.

    Args:
        overrides: as on the command line, such as "run=outputs/default/NAME" or "samples=4".
        config_dir: folder with YAML files of your own, as --config-dir.

    Raises:
        ConfigError: the command is wrong, or has completions=, which only the shell's command scores.
        RunFailed: the engine failed; the same call goes on.
    """
    for each in overrides:
        if each.startswith("-"):
            raise ConfigError(f"{each}: expected key=value; flags are for the shell")
    flags = [f"--config-dir={config_dir}"] if config_dir else []
    command = read_command(compose_command(LINE, [*overrides, *flags]))
    if command.completions is not None:
        raise error(
            "completions", command.completions, "run= or model=; python -m capo_exp.evaluate takes it"
        )
    return [score for job in find_jobs(command) for score in evaluate_job(command, job)]


@dataclass(frozen=True)
class Runs:
    """Logged runs and their rows as tables; `.to_pandas()` makes data frames of them."""

    runs: list[LoggedRun]
    metrics: "pa.Table"
    """One row an optimiser step: `run`, the settings asked for, and the keys of docs/METRICS.md."""
    evaluations: "pa.Table"
    """One row an evaluation."""
    settings: tuple[str, ...]
    """Dotted configuration keys that are columns of every table."""

    def completions(self, step: int | None = None) -> "pa.Table":
        """Returns the kept completions, of one rollout step or of all, with each token's shifts."""
        return _table([(run, load_completions(run, step)) for run in self.runs], self.settings)


def load_runs(*places: str | Path, settings: Sequence[str] = ()) -> Runs:
    """Reads runs from disk; what is damaged is named in each run's `left_out`.

    Args:
        places: run directories, folders with runs at any depth, or globs; outputs if none is given.
        settings: dotted configuration keys that become columns, such as "algo.name", "seed".

    Raises:
        ConfigError: there is no run in a place.
    """
    runs = [load_run(path) for path in find_runs(places or ("outputs",))]
    metrics = _table([(run, run.metrics) for run in runs], settings)
    evaluations = _table([(run, run.evaluations) for run in runs], settings)
    return Runs(runs, metrics, evaluations, tuple(settings))


def _table(of_runs: Iterable[tuple[LoggedRun, Sequence[LoggedRow]]], settings: Sequence[str]) -> "pa.Table":
    """Returns a table of all rows, in which a missing key is null."""
    import pyarrow as pa  # slow, and only for who wants tables

    rows: list[Mapping[str, Any]] = []
    for run, own in of_runs:
        known = {"run": run.name} | {key: run.setting(key) for key in settings}
        rows += [known | dict(row) for row in own]
    columns = dict.fromkeys(key for row in rows for key in row)
    return pa.table({key: [row.get(key) for row in rows] for key in columns})
