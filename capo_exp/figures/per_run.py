"""The families without a metric over x: where the time of a step goes, and what the configs say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox

from capo_exp.figures import style
from capo_exp.figures.bars import ink_on
from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import short
from capo_exp.figures.panel import Column, Panel, Series, cell_text, format_values, list_rows, of_estimates
from capo_exp.figures.study import Metric, Study
from capo_exp.figures.style import Look
from capo_exp.runs import metrics as names
from capo_exp.runs.read import LARGEST, LoggedRun

TOTAL = "time/total_seconds"
STAGES = {
    "sampling": "time/rollout_seconds", "weight transfer": "time/transfer_seconds",
    "verification": "time/reward_seconds", "credit": "time/credit_seconds",
    "scoring pass": "time/scoring_seconds", "forward and backward": "time/policy_seconds",
    "curvature": "time/curvature_seconds", "update": "time/update_seconds",
    "calibration": "time/calibration_seconds",
}  # fmt: skip
EDGE: dict[str, Any] = {"edgecolor": style.REFERENCE, "linewidth": 0.5}
SETTINGS = {
    "learning rate": "regime.learning_rate", "prompts": "regime.prompts_per_step",
    "group": "regime.group_size", "rollout steps": "num_steps", "passes": "algo.num_iterations",
    "clip low": "algo.token_loss.clip_eps_low", "clip high": "algo.token_loss.clip_eps_high",
    "KL": "algo.kl_coefficient", "m_F below": "algo.selection.policy_shift_max",
    "m_H above": "algo.selection.objective_shift_min", "m_H below": "algo.selection.objective_shift_max",
    "step model": "curvature.optimizer_model",
}  # fmt: skip


def stages(study: Study, drawn: Sequence[Curve], title: str) -> Panel:
    """Returns the share of each stage in the time of a step, means over steps and seeds."""
    timed = {c.label: np.array([spent for run in c.runs if (spent := _seconds(run))]) for c in drawn}
    shown = [curve for curve in drawn if len(timed[curve.label])]
    every = [*STAGES, "other"]
    used = [i for i in range(len(every)) if any(timed[c.label][:, i].any() for c in shown)]
    totals = {curve.label: timed[curve.label].sum(axis=1) for curve in shown}
    per = {k: [study.over_seeds(timed[k][:, i] / total) for i in used] for k, total in totals.items()}
    seconds = {label: study.over_seeds(total) for label, total in totals.items()}
    columns = [
        Column(every[i], "percent", {label: row[at] for label, row in per.items()})
        for at, i in enumerate(used)
    ]
    return Panel(
        "stages", title, _paint_stages, metric=study.settled(Metric(TOTAL, TOTAL, "percent")),
        height=0.9 + 0.36 * len(shown), columns=(Column("seconds a step", "seconds", seconds), *columns),
        series=tuple(
            of_estimates(c, [every[i] for i in used], per[c.label], len(timed[c.label])) for c in shown
        ),
        absent=tuple(curve.label for curve in drawn if curve not in shown),
        marks=tuple(Patch(label=every[i], facecolor=style.STAGES[i], **EDGE) for i in used),
    )  # fmt: skip


def _seconds(run: LoggedRun) -> list[float]:
    """Returns the mean seconds of a rollout step in each stage and in the rest; none without times.

    Rows of one step repeat its total and the first four stages; the others are an update's own.
    """
    rows = [row for row in run.metrics if 0 < (row.get(TOTAL) or 0) < LARGEST]
    steps = list({row.get(names.STEP, i): row for i, row in enumerate(rows)}.values())
    of = {key: steps if place < 4 else rows for place, key in enumerate(STAGES.values())}
    named = [sum(row.get(key) or 0.0 for row in each) for key, each in of.items()]
    rest = max(0.0, sum(row[TOTAL] for row in steps) - sum(named))
    return [seconds / len(steps) for seconds in (*named, rest)] if steps else []


def _paint_stages(axes: Axes, panel: Panel, panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    for place, series in zip(list_rows(axes, panel.labels), panel.series, strict=True):
        left = 0.0
        for share, mark in zip(series.centre, panel.marks, strict=True):
            face = mark.get_facecolor()
            axes.barh(place, share, 0.62, left=left, color=face, **EDGE)
            if share > 0.05:
                middle = {"ha": "center", "va": "center", "fontsize": 8, "color": ink_on(face)}
                axes.text(left + share / 2, place, f"{share:.0%}", **middle)
            left += float(share)
        seconds = cell_text(panel.columns[0].cells[series.curve.label], "seconds")
        axes.text(1.01, place, seconds, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set(xlabel="share of a rollout step; at the right its seconds", xlim=(0, 1))
    format_values(axes.xaxis, "percent")


def settings_table(drawn: Sequence[Curve], title: str) -> Panel:
    """Returns what the curves' configs say; keys that no run has are left out."""
    columns = [
        Column(name, "text", {curve.label: _said(curve.run.setting(key)) for curve in drawn})
        for name, key in SETTINGS.items()
    ]
    shown = tuple(column for column in columns if any(column.cells.values()))
    empty = np.array([])
    series = tuple(Series(curve, [], empty, empty, empty, empty) for curve in drawn) if shown else ()
    height = 0.3 + 0.27 * (1 + len(series))
    lack = "the runs have no config.yaml"
    return Panel("settings", title, _paint_table, series=series, height=height, columns=shown, lack=lack)


def _said(value: object) -> str:
    """Says a config value as a cell; what is not there or does not bind is empty."""
    return "" if value is None or (isinstance(value, float) and np.isinf(value)) else short(value)


def _paint_table(axes: Axes, panel: Panel, panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    axes.axis("off")
    labels, columns = panel.labels, panel.columns
    cells = [[cell_text(column.cells[name], column.unit) for column in columns] for name in labels]
    drawn = axes.table(
        cells, rowLabels=labels, colLabels=[column.heading for column in columns],
        edges="horizontal", loc="center", cellLoc="right", colLoc="right", rowLoc="left", bbox=Bbox.unit(),
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8.5)
    for cell in drawn.get_celld().values():
        cell.set_edgecolor("#BBBBBB")
        cell.get_text().set_parse_math(False)
