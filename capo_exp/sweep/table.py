"""The table of runs: what they are, and how far. Reads files, not torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

from rich.table import Table

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.read import LoggedRun, load_run, read_jsonl
from capo_exp.runs.record import read_record, run_status

RECENT = 10
"""Steps that training accuracy is the mean of, and the time left is reckoned from."""

WIDTH = 160
"""Columns where the output is not a terminal."""


@dataclass(frozen=True)
class RunSummary:
    """One run of the table."""

    name: str
    state: str
    """running | finished | failed | interrupted | unreadable."""
    step: int
    num_steps: int | None
    """None if config.yaml is missing."""
    train_accuracy: float | None
    eval_accuracy: float | None
    rejection_rate: float | None
    """Mean of all steps."""
    seconds_left: float | None
    """At the pace of the last steps, without evaluations; None unless it runs."""
    error: str | None
    path: Path


def summarise_run(path: Path) -> RunSummary:
    """Reads one run as it is now; a run.json that is not JSON hides no other run."""
    try:
        record = read_record(path) or {}
    except ConfigError as error:
        return RunSummary(path.name, "unreadable", 0, None, None, None, None, None, str(error), path)
    run = load_run(path) if (path / "metrics.jsonl").exists() else LoggedRun(path, {}, record, [], [])
    state = run_status(path)
    rows = list({row[names.STEP]: row for row in run.metrics if names.STEP in row}.values())
    recent = rows[-RECENT:]
    step = int(rows[-1][names.STEP]) if rows else 0
    total = run.setting("num_steps")
    pace = median(_values(recent, "time/total_seconds") or [0.0])
    evaluations = _values(read_jsonl(path / "eval.jsonl"), names.EVAL_ACCURACY)
    return RunSummary(
        name=path.name,
        state=state,
        step=step,
        num_steps=total,
        train_accuracy=_mean(recent, names.TRAIN_ACCURACY),
        eval_accuracy=evaluations[-1] if evaluations else None,
        rejection_rate=_mean(rows, names.REJECTION_RATE),
        seconds_left=pace * (total - step) if state == "running" and total and pace else None,
        error=(record.get("error") or "").split("\n")[0] or None if state == "failed" else None,
        path=path,
    )


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Returns the runs, one a row, with the errors of failed ones below their names."""
    result = Table(box=None, pad_edge=False)
    result.add_column("run", overflow="fold")
    for column in ("state", "step", "train", "held-out", "rejected", "left"):
        result.add_column(column, no_wrap=True)
    for run in runs:
        name = "\n  ".join([run.name, *(run.error or "").splitlines()])
        left = "" if run.seconds_left is None else str(timedelta(seconds=round(run.seconds_left)))
        result.add_row(
            name, run.state, f"{run.step}/{'?' if run.num_steps is None else run.num_steps}",
            _percent(run.train_accuracy), _percent(run.eval_accuracy), _percent(run.rejection_rate), left,
        )  # fmt: skip
    return result


def _values(rows: Sequence[Mapping[str, float | None]], key: str) -> list[float]:
    return [value for row in rows if (value := row.get(key)) is not None]


def _mean(rows: Sequence[Mapping[str, float | None]], key: str) -> float | None:
    values = _values(rows, key)
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
