"""The family of curves over x: centres with bands, a line at the reference, and how soon each reaches it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import Bbox, TransformedBbox

from capo_exp.core.intervals import Estimate
from capo_exp.figures import style
from capo_exp.figures.bands import Band
from capo_exp.figures.curves import Curve
from capo_exp.figures.panel import (
    Column,
    Level,
    Panel,
    Series,
    format_values,
    label_levels,
    of_band,
    thousands,
    value_text,
)
from capo_exp.figures.stats import Factor, sample_efficiency
from capo_exp.figures.study import X_LABELS, Metric, Study, subject
from capo_exp.figures.style import Look
from capo_exp.runs.read import Array

MARKS = 7
"""Markers along a line, about."""
NEAR = 0.06
"""Share of the axis that crosses are apart, at least."""
EDGES = Bbox([[-0.02, -0.02], [1.01, 1.02]])
HALO: list[AbstractPathEffect] = [withStroke(linewidth=2.5, foreground="white")]
DASHED = {"color": style.REFERENCE, "linewidth": 1.0, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Told:
    """What a panel of curves says beside them."""

    reference: Literal["", "end", "max"] = ""
    """Where the line of the reference's curve is: at its end, at its largest value, nowhere."""
    efficiency: bool = False
    """Whether to mark where curves reach that line, and to say the sample-efficiency factor."""
    summary: tuple[str, ...] = ("final",)
    """Columns of the table: final | mean | max."""
    heading: str = ""
    """Name of these columns in place of the title."""
    levels: tuple[Level, ...] = ()  # Further lines


def lines(study: Study, drawn: Sequence[Curve], metric: Metric, title: str, told: Told) -> Panel:
    """Returns a panel with a metric over x."""
    metric = study.settled(metric)
    found = study.bands_of(drawn, metric)
    shown = [curve for curve in drawn if curve.label in found]
    level = _reference_level(study, metric, told.reference, drawn) if shown else None
    others = [found[curve.label] for curve in shown if not study.is_reference(curve)]
    factors = _efficiencies(study, metric, shown) if told.efficiency and level else {}
    heading = told.heading or title
    columns = [
        Column(f"{heading}, {how}", metric.unit, {k: reduced(study, found[k], how) for k in found})
        for how in told.summary
    ]
    if factors:
        cells = {
            curve.label: _factor_cell(factors[curve.label]) if curve.label in factors
            else "reference" if study.is_reference(curve) else "other problems"
            for curve in shown
        }  # fmt: skip
        columns.append(Column(f"{heading}, sample efficiency", "times", cells))
    return Panel(
        "lines", title, _paint, metric=metric, height=3.1, columns=tuple(columns),
        series=tuple(of_band(curve, found[curve.label]) for curve in shown),
        levels=(*([level] if level else []), *told.levels),
        crossings=tuple(
            (curve, factor) for curve in shown if (factor := factors.get(curve.label)) and factor.factor > 0
        ),
        wants_reference=bool(told.reference),
        x_max=max((float(band.x[-1]) for band in others), default=None),
        absent=tuple(curve.label for curve in drawn if curve.label not in found),
    )  # fmt: skip


def _reference_level(study: Study, metric: Metric, where: str, drawn: Sequence[Curve]) -> Level | None:
    """Returns a line at the end of the reference's curve, or at its largest value."""
    curve = study.reference if where else None
    found = study.band(curve, metric) if curve else None
    if curve is None or found is None or not found.count.any():
        return None
    label = next((one.label for one in drawn if study.is_reference(one)), curve.label)
    if where == "max":
        meaning = ": the largest value of its curve"
        return Level(f"{label}, largest", float(np.nanmax(found.centre[: found.end + 1])), meaning)
    last, along = found.end, X_LABELS.get(metric.x, metric.x)
    meaning = f", the end of {label}'s curve after {found.x[last]:,.0f} {along}"
    return Level(f"{label} at {thousands(found.x[last])}", float(found.centre[last]), meaning)


def _efficiencies(study: Study, metric: Metric, shown: Sequence[Curve]) -> dict[str, Factor]:
    """Returns the factors of the other curves of the reference's model and problems, by label."""
    one = study.reference
    reference = one and study.band(one, metric)
    if one is None or reference is None:
        return {}
    start, alike = study.start_of(one, metric), [c for c in shown if subject(c.run) == subject(one.run)]
    bands = {c.label: study.band(c, metric) for c in alike if not study.is_reference(c)}
    return {k: sample_efficiency(reference, band, start=start) for k, band in bands.items() if band}


def _factor_cell(factor: Factor) -> Estimate | str:
    if not factor.factor > 0:
        return "reference does not improve" if np.isnan(factor.target) else "not reached"
    bounds = (factor.low, factor.high) if np.isfinite(factor.low) else ()
    return Estimate(factor.factor, *bounds)


def reduced(study: Study, found: Band, how: str) -> Estimate:
    """Returns one number for a curve: at its end, or the mean or largest of each seed's values."""
    if how == "final":
        value, *bounds = (float(part[found.end]) for part in (found.centre, found.low, found.high))
        return Estimate(value, *(bounds if np.isfinite(bounds).all() else ()))
    of = {"mean": np.nanmean, "max": np.nanmax}[how]
    return study.over_seeds(of(found.values[np.isfinite(found.values).any(axis=1)], axis=1))


def _paint(axes: Axes, panel: Panel, panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    """Draws centres over x with their bands, the levels, where curves cross the first, where seeds end."""
    metric = panel.named
    for place, series in enumerate(panel.series):
        _draw_curve(axes, series, looks[series.curve.label], place, log=panel.is_log)
    for level in panel.levels:
        axes.axhline(level.y, zorder=1.5, **DASHED)
    if panel.is_log:
        axes.set_yscale("log")
    axes.set(xlabel=X_LABELS.get(metric.x, metric.x))
    axes.set_ylabel("" if metric.label.lower() == panel.title.lower() else metric.label)
    left = min(series.numbers[0] for series in panel.series)
    axes.set_xlim(0 if panel.x_max or left <= 0 else None, panel.x_max or None)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    format_values(axes.yaxis, metric.unit, log=panel.is_log)
    low, high = metric.limits
    if high is None and low == 0 and not any(np.nanmax(s.centre, initial=0) > 0 for s in panel.series):
        high = 0.01  # nothing but zeros
    axes.set_ylim(low, high)
    if metric.unit == "percent":  # an interval may reach beyond all shares, the axis does not
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.05), min(high, 1.05))
    label_levels(
        axes, [(level.y, value_text(level.y, metric.unit), style.REFERENCE) for level in panel.levels]
    )
    _draw_crossings(axes, panel.crossings, looks)
    for series in panel.series:
        _draw_losses(axes, series, looks[series.curve.label].colour)


def _draw_curve(axes: Axes, series: Series, look: Look, place: int, *, log: bool) -> None:
    """Draws one curve, thin where fewer than half of its seeds go on, with markers of its own places."""

    def shown(values: Array) -> Array:
        return np.where(values > 0, values, np.nan) if log else values  # a log axis shows nothing else

    x, centre = series.numbers, shown(series.centre)
    if np.isfinite(shown(series.low)).any():
        axes.fill_between(
            x, shown(series.low), shown(series.high), color=look.colour, alpha=0.16, linewidth=0
        )
    few = [at for at, left in series.losses if 2 * left < series.drawn]
    solid = int(np.searchsorted(x, few[0], side="right")) if few else len(x)
    every = max(1, solid // MARKS)
    marked = list(range((1 + place) * every // 4, max(1, solid - 1), every)) or [0]
    drawn = axes.plot(x[:solid], centre[:solid], **look.line, markevery=marked)
    if solid < len(x):
        rest = slice(max(0, solid - 1), None)
        drawn += axes.plot(x[rest], centre[rest], color=look.colour, ls=look.dashes, lw=0.7)
    for line in drawn:  # what is at the edge is whole, what is beyond the axis is not there
        line.set_clip_box(TransformedBbox(EDGES, axes.transAxes))


def _draw_losses(axes: Axes, series: Series, colour: str) -> None:
    """Draws a cross where seeds end, and beside it how many still count; of near ones the last."""
    left, right = axes.get_xlim()
    inside = [(x, count) for x, count in series.losses if x <= right]
    for (x, count), (after, _) in pairwise([*inside, (np.inf, 0)]):
        if after - x < NEAR * (right - left):
            continue
        y = max(float(np.interp(x, series.numbers, series.centre)), axes.get_ylim()[0])  # a log axis has no 0
        axes.plot(x, y, "x", ms=6, mew=1.6, color=colour, zorder=5, clip_on=False)
        if count and not series.stopped:
            text = axes.annotate(
                f"n={count}", (x, y), xytext=(3, 5), textcoords="offset points", fontsize=7.5, color=colour
            )
            text.set_path_effects(HALO)


def _draw_crossings(axes: Axes, crossings: Sequence[tuple[Curve, Factor]], looks: Mapping[str, Look]) -> None:
    """Draws a ring where a curve first reaches the line, and its factor; neighbours are set higher."""
    left, right = axes.get_xlim()
    above, before = 0, -np.inf
    for curve, factor in sorted(crossings, key=lambda pair: pair[1].method_x):
        at = (factor.method_x, factor.target)
        place = (at[0] - left) / (right - left)
        above = above + 1 if place - before < 0.09 else 0
        before = place
        look = looks[curve.label]
        axes.plot(*at, "o", ms=7.5, mfc="none", mec=look.colour, mew=1.3, zorder=5)
        side, shift = ("right", -5) if place > 0.1 else ("left", 4)
        text = axes.annotate(
            f"{factor.factor:.3g}x", at, xytext=(shift, 6 + 11 * above),
            textcoords="offset points", ha=side, color=look.colour, fontsize=9, fontweight="bold", zorder=6,
        )  # fmt: skip
        text.set_path_effects(HALO)


def legend_entries(panels: Sequence[Panel], looks: Mapping[str, Look]) -> list[Line2D]:
    """Returns what the legend explains of line panels: the curves, then the levels."""
    mine = [panel for panel in panels if panel.kind == "lines"]
    named = {series.curve.label for panel in mine for series in panel.series}
    levels = dict.fromkeys(level.label for panel in mine for level in panel.levels)
    return [
        *(Line2D([], [], label=label, **looks[label].line) for label in looks if label in named),
        *(Line2D([], [], label=label, **DASHED) for label in levels),
    ]
