"""The report's tables, as text: the runs in a line each, what differs between them, where they come from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean
from typing import Any

from capo_exp.figures import style
from capo_exp.figures.curves import Curve
from capo_exp.figures.plots import outcome, steps_done
from capo_exp.figures.tables import TextTable
from capo_exp.runs import metrics as names
from capo_exp.runs.read import RECENT, LoggedRun, values
from capo_exp.runs.settings import results, varying

MACHINE = ("device", "cpu", "platform")
COLUMNS = (
    "run", "state", "steps", "training", "held-out, first → last", "best", "rejected, mean", "largest",
    "completions", "wall time",
)  # fmt: skip

MOST_SECONDS = 1e10
"""A run that says to have taken longer, three centuries, is damaged."""


@dataclass(frozen=True)
class Cell:
    """A number of the summary."""

    text: str
    value: float | str  # What the column is sorted by; "" where the run has no such number


@dataclass(frozen=True)
class RunLine:
    """A run of the summary."""

    label: str
    name: str
    colour: str
    error: str | None
    cells: list[Cell]


def in_order(runs: Sequence[LoggedRun], curves: Sequence[Curve]) -> list[LoggedRun]:
    """Returns the runs of the first curve, those of the next, and at last those of none."""
    place = {run.path: i for i, run in enumerate(run for curve in curves for run in curve.runs)}
    return sorted(runs, key=lambda run: place.get(run.path, len(place)))


def run_labels(runs: Sequence[LoggedRun], curves: Sequence[Curve]) -> list[str]:
    """Returns a name for each run that no other has: its curve and seed, else its folder."""
    of_path = {run.path: curve.label for curve in curves for run in curve.runs}
    short = [
        f"{of_path[run.path]} · seed {run.setting('seed', '?')}" if run.path in of_path else run.path.name
        for run in runs
    ]
    count = Counter(short)
    return [
        text if count[text] == 1 else f"{text} · {run.path.parent.name}/{run.path.name}"
        for text, run in zip(short, runs, strict=True)
    ]


def overview(runs: Sequence[LoggedRun], named: Sequence[str], curves: Sequence[Curve]) -> list[RunLine]:
    """Returns a line for each run, in the colour of its curve."""
    looks = style.looks(curves)
    colours = {run.path: looks[curve.label].colour for curve in curves for run in curve.runs}
    return [
        RunLine(label, run.path.name, colours.get(run.path, style.OTHER), _trouble(run), _cells(run))
        for run, label in zip(runs, named, strict=True)
    ]


def _trouble(run: LoggedRun) -> str | None:
    """Says why a run failed, and what of its files could not be read."""
    failed = run.record.get("error") if run.state == "failed" else None
    return "; ".join(filter(None, [failed, *(f"left out: {text}" for text in run.left_out)])) or None


def _cells(run: LoggedRun) -> list[Cell]:
    done, planned = steps_done(run), run.setting("num_steps", "?")
    recent = values(run.steps[-RECENT:], names.TRAIN_ACCURACY)
    held_out = values(run.evaluations, names.EVAL_ACCURACY)
    rejected = values(run.metrics, names.REJECTION_RATE)
    completions = values(run.metrics, names.COMPLETIONS)
    seconds = run.record.get("wall_seconds") or 0
    none = Cell("-", "")
    return [
        Cell(outcome(run), outcome(run)),
        Cell(f"{done} of {planned}", done),
        _percent(fmean(recent)) if recent else none,
        Cell(f"{held_out[0]:.1%} → {held_out[-1]:.1%}", held_out[-1]) if held_out else none,
        _percent(max(held_out)) if held_out else none,
        _percent(fmean(rejected)) if rejected else none,
        _percent(max(rejected)) if rejected else none,
        Cell(f"{max(completions):,.0f}", max(completions)) if completions else none,
        Cell(str(timedelta(seconds=round(seconds))), seconds) if 0 < seconds < MOST_SECONDS else none,
    ]


def _percent(share: float) -> Cell:
    return Cell(f"{share:.1%}", share)


def differing(runs: Sequence[LoggedRun], named: Sequence[str]) -> TextTable:
    """Returns what differs, a row a setting, a column for the runs that are alike but for their seed.

    How often a run is measured is such a setting; keys that change no number of a run
    (runs.record.NOT_RESULTS) and the folder of the problems are not. What a run does not have is a dash.
    """
    every = list(map(results, runs))
    table = {key: [each.get(key) for each in every] for key in varying(every) if key != "dataset.path"}
    seeds = table.pop("seed", None)
    columns: dict[tuple[str, ...], list[int]] = {}
    for place in range(len(runs)):
        columns.setdefault(tuple(say_value(row[place]) for row in table.values()), []).append(place)
    rows = [[key, *row] for key, row in zip(table, zip(*columns, strict=True), strict=True)]
    if seeds is not None:
        rows.append(
            ["seed", *(", ".join(say_value(seeds[p]) for p in places) for places in columns.values())]
        )
    return TextTable(["setting", *(_head(places, named) for places in columns.values())], rows)


def _head(places: Sequence[int], named: Sequence[str]) -> str:
    stems = {named[place].partition(" · seed ")[0] for place in places}
    return named[places[0]] if len(places) == 1 else f"{' / '.join(sorted(stems))} ({len(places)} runs)"


def say_value(value: Any) -> str:
    """Says a config value for people."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {say_value(each)}" for key, each in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def origins(runs: Sequence[LoggedRun], made_by: str) -> list[tuple[str, str]]:
    """Says what made this page and the runs in it; no date, so that it can be made again."""
    records = [run.record for run in runs]
    named = [r["packages"] for r in records if isinstance(r.get("packages"), dict)]
    packages = [f"{name} {version}" for each in named for name, version in each.items()]
    rows = {
        "made by": [made_by],
        "runs": [str(run.record.get("run_id", run.path.name)) for run in runs],
        "commits": [
            f"{git.get('commit') or 'unknown'}{' with changes (git.diff)' if git.get('dirty') else ''}"
            for git in (record.get("git") or {} for record in records)
        ],
        "packages": [*(f"python {r['python']}" for r in records if "python" in r), *packages],
        "machines": [" / ".join(str(r[key]) for key in MACHINE if r.get(key)) for r in records],
        "problems": [f"fingerprint {record['data']}" for record in records if "data" in record],
    }
    return [(key, ", ".join(dict.fromkeys(filter(None, found)))) for key, found in rows.items() if any(found)]
