"""The table of runs: what they are, and how far. Reads files, not torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from capo_exp.config.errors import printable
from capo_exp.runs import metrics as names
from capo_exp.runs.read import RECENT, load_run, values


@dataclass(frozen=True)
class RunSummary:
    """One run of the table."""

    name: str
    state: str  # running | finished | failed | interrupted | unreadable
    step: int
    num_steps: int | None  # None if config.yaml is missing
    train_accuracy: float | None
    eval_accuracy: float | None
    rejection_rate: float | None  # Mean of all steps
    seconds_left: float | None  # At the pace of the last steps, without evaluations; None unless it runs
    error: str | None


def summarise_run(path: Path) -> RunSummary:
    """Reads one run as it is now; what of it is damaged is said as its error."""
    run = load_run(path)
    state = run.state
    rows, recent = run.steps, run.steps[-RECENT:]
    step = int(rows[-1][names.STEP]) if rows else 0
    total = run.setting("num_steps") if isinstance(run.setting("num_steps"), int) else None
    pace = median(values(recent, "time/total_seconds") or [0.0])
    evaluations = values(run.evaluations, names.EVAL_ACCURACY)
    failure = (run.record.get("error") or "").split("\n")[:1] if state == "failed" else []
    said = [*filter(None, failure), *(f"left out: {text}" for text in run.left_out)]
    return RunSummary(
        name=path.name,
        state=state,
        step=step,
        num_steps=total,
        train_accuracy=_mean(values(recent, names.TRAIN_ACCURACY)),
        eval_accuracy=evaluations[-1] if evaluations else None,
        rejection_rate=_mean(values(rows, names.REJECTION_RATE)),
        seconds_left=pace * (total - step) if state == "running" and total and pace else None,
        error="\n".join(said) or None,
    )


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Returns the runs, one a row, with the errors of failed ones below their names."""
    result = Table(box=None, pad_edge=False)
    result.add_column("run", overflow="fold")
    for column in ("state", "step", "train", "held-out", "rejected", "left"):
        result.add_column(column, no_wrap=True)
    for run in runs:
        said = "\n  ".join([run.name, *(run.error or "").splitlines()])
        name = Text(printable(said))
        left = "" if run.seconds_left is None else str(timedelta(seconds=round(run.seconds_left)))
        result.add_row(
            name, run.state, f"{run.step}/{'?' if run.num_steps is None else run.num_steps}",
            _percent(run.train_accuracy), _percent(run.eval_accuracy), _percent(run.rejection_rate), left,
        )  # fmt: skip
    return result


def console() -> Console:
    """Returns standard output, as wide as a terminal, or with room enough in a log file."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def _mean(found: Sequence[float]) -> float | None:
    return sum(found) / len(found) if found else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
