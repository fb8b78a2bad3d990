"""Panels whose numbers are no curve: where the time of a step goes, and what the configs say."""

from collections.abc import Sequence

import numpy as np

from capo_exp.figures import labels
from capo_exp.figures.catalogue import PanelSpec
from capo_exp.figures.curves import Curve
from capo_exp.figures.measure import Column, Panel, bars, parts
from capo_exp.figures.study import Lacking, Series, Study, Unfit, estimate
from capo_exp.runs.read import LoggedRun


def cell_of(curve: Curve) -> tuple[float, int]:
    """Learning rate, and completions a step."""
    run = curve.runs[0]
    rate, prompts, group = (
        run.setting(f"regime.{key}", 0) for key in ("learning_rate", "prompts_per_step", "group_size")
    )
    return float(rate), int(prompts * group)


def heat(spec: PanelSpec, title: str, study: Study, drawn: Sequence[Curve]) -> Panel:
    """One number for each learning rate and batch of a method.

    Raises:
        Unfit: the method has one pair only.
        Lacking: several curves have the same pair.
    """
    cells: dict[tuple[float, int], str] = {}
    for curve in drawn:
        if (other := cells.setdefault(cell_of(curve), curve.label)) != curve.label:
            raise Lacking(f"{other} and {curve.label} have the same learning rate and batch; narrow runs=")
    if len(cells) < 2:
        raise Unfit("needs a method with more than one learning rate or batch")
    return bars(spec, title, study, drawn)


def stages(spec: PanelSpec, title: str, study: Study, drawn: Sequence[Curve]) -> Panel:
    """Share of each stage in the time of a step, means over steps and seeds."""
    timed = {curve.label: [run for run in curve.runs if total_time(run, spec)] for curve in drawn}
    shown = [curve for curve in drawn if timed[curve.label]]
    names = [*spec.keys, "other"]
    shares = {c.label: np.array([shares_of(run, spec) for run in timed[c.label]]) for c in shown}
    per = {label: [estimate(study, column) for column in table.T] for label, table in shares.items()}
    used = [i for i, _ in enumerate(names) if any(table[:, i].any() for table in shares.values())]
    seconds = {
        c.label: estimate(study, np.array([total_time(run, spec) for run in timed[c.label]])) for c in shown
    }
    columns = [Column(names[i], spec.unit, {label: row[i] for label, row in per.items()}) for i in used]
    return Panel(
        spec=spec,
        title=title,
        series=tuple(
            Series(
                c, [names[i] for i in used], *parts([per[c.label][i] for i in used]),
                np.full(len(used), len(timed[c.label])),
            )
            for c in shown
        ),
        columns=(Column("seconds a step", "seconds", seconds), *columns),
        absent=tuple(curve.label for curve in drawn if not timed[curve.label]),
    )  # fmt: skip


def total_time(run: LoggedRun, spec: PanelSpec) -> float:
    """Mean seconds of a step; 0 if the run has not logged any."""
    found = [row[spec.key] for row in run.metrics if row.get(spec.key) is not None]
    return float(np.mean(found)) if found else 0.0


def shares_of(run: LoggedRun, spec: PanelSpec) -> list[float]:
    """Of each stage and of the rest, in the time of all steps."""
    rows = [row for row in run.metrics if row.get(spec.key) is not None]
    named = [sum(row.get(key) or 0.0 for row in rows) for key in spec.keys.values()]
    total = max(sum(row[spec.key] for row in rows), sum(named))
    return [*(seconds / total for seconds in named), 1.0 - sum(named) / total]


def settings(spec: PanelSpec, title: str, study: Study, drawn: Sequence[Curve]) -> Panel:
    """What the curves' configs say; keys that no run has are left out."""
    columns = [
        Column(name, "text", {curve.label: said(curve.runs[0].setting(key)) for curve in drawn})
        for name, key in spec.keys.items()
    ]
    shown = tuple(column for column in columns if any(column.cells.values()))
    empty = np.array([])
    series = tuple(Series(curve, [], empty, empty, empty, empty) for curve in drawn) if shown else ()
    return Panel(spec=spec, title=title, series=series, columns=shown)


def said(value: object) -> str:
    """A config value as a cell; what is not there or does not bind is empty."""
    return "" if value is None or (isinstance(value, float) and np.isinf(value)) else labels.short(value)
