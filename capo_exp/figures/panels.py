"""Numbers of a panel -> axes. One function for each kind of lines; other kinds are in charts.py."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, ScalarFormatter

from capo_exp.figures import style
from capo_exp.figures.measure import Crossing, Panel, y_label
from capo_exp.figures.study import Series
from capo_exp.figures.style import Look
from capo_exp.figures.tables import value_text
from capo_exp.runs.read import Array

MARKS = 7
"""Markers along a line, about."""


def draw_lines(axes: Axes, panel: Panel, looks: Mapping[str, Look], x_label: str) -> None:
    """Centres over x with their bands, the levels, and where curves cross the first."""
    log = is_log(panel)
    for place, whole in enumerate(panel.series):
        series = shown_part(whole, panel.x_max)
        draw_series(axes, series, looks[series.curve.label], place, log=log)
    for level in panel.levels:
        axes.axhline(level.y, color=style.REFERENCE, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
        axes.annotate(
            value_text(level.y, panel.spec.unit), (1, level.y), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=style.REFERENCE,
        )  # fmt: skip
    if log:
        axes.set_yscale("log")
    unit = y_label(panel.spec)
    axes.set(title=panel.title, xlabel=x_label)
    axes.set_ylabel("" if unit.lower() == panel.title.lower() else unit)
    left = min(series.numbers[0] for series in panel.series)
    axes.set_xlim(0 if panel.x_max or left <= 0 else None, panel.x_max or None)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    format_values(axes.yaxis, panel)
    limit(axes, panel)
    draw_crossings(axes, panel.crossings, looks)


def draw_series(axes: Axes, series: Series, look: Look, place: int, *, log: bool) -> None:
    """One curve; markers of different curves are at different places."""
    x = series.numbers
    centre, low, high = (positive(part) if log else part for part in (series.centre, series.low, series.high))
    if np.isfinite(low).any():
        axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
    every = max(1, len(x) // MARKS)
    marked = list(range((1 + place) * every // 4, max(1, len(x) - 1), every)) or [0]
    axes.plot(x, centre, **look.line, markevery=marked, clip_on=False)


def shown_part(series: Series, x_max: float | None) -> Series:
    """The points up to the end of the axis, and where the line to the next one meets it."""
    x = series.numbers
    if x_max is None or x[-1] <= x_max:
        return series
    inside = np.append(x[x < x_max], x_max)
    centre, low, high = (np.interp(inside, x, part) for part in (series.centre, series.low, series.high))
    return Series(series.curve, inside, centre, low, high, series.seeds[: len(inside)])


def is_log(panel: Panel) -> bool:
    """Whether the axis is to be logarithmic and the numbers span a decade, as good ticks need."""
    if not panel.spec.log:
        return False
    found = np.concatenate([series.centre for series in panel.series])
    found = found[found > 0]
    return len(found) > 0 and bool(found.max() >= 10 * found.min())


def positive(values: Array) -> Array:
    """Without what a log axis cannot show."""
    return np.where(values > 0, values, np.nan)


def format_values(axis: Axis, panel: Panel) -> None:
    """Ticks of the panel's unit."""
    if panel.spec.unit == "percent":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    elif panel.spec.unit == "number" and not is_log(panel):
        axis.set_major_formatter(small_numbers())
    elif panel.spec.unit == "completions":
        axis.set_major_formatter(EngFormatter(sep=""))


def small_numbers() -> ScalarFormatter:
    """A power of ten above the axis where numbers are small or large."""
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-2, 4))
    return formatter


def limit(axes: Axes, panel: Panel) -> None:
    """The limits that the figure's YAML sets, or reaching its levels."""
    low, high = panel.spec.y_limits
    if high is None and low == 0 and not any(np.nanmax(s.centre, initial=0) > 0 for s in panel.series):
        high = 0.01  # nothing but zeros
    axes.set_ylim(low, high)


def draw_crossings(axes: Axes, crossings: Sequence[Crossing], looks: Mapping[str, Look]) -> None:
    """A ring where a curve first reaches the reference's line, and its factor; neighbours are set higher."""
    left, right = axes.get_xlim()
    above, before = 0, -np.inf
    for crossing in sorted(crossings, key=lambda one: one.x):
        place = (crossing.x - left) / (right - left)
        above = above + 1 if place - before < 0.09 else 0
        before = place
        look = looks[crossing.curve.label]
        axes.plot(crossing.x, crossing.y, "o", ms=7.5, mfc="none", mec=look.colour, mew=1.3, zorder=5)
        side, shift = ("right", -5) if place > 0.1 else ("left", 4)
        text = axes.annotate(
            f"{crossing.factor:.3g}x", (crossing.x, crossing.y), xytext=(shift, 6 + 11 * above),
            textcoords="offset points", ha=side, color=look.colour, fontsize=9, fontweight="bold", zorder=6,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def handles(panels: Sequence[Panel], looks: Mapping[str, Look]) -> list[Line2D]:
    """What the legend explains: the curves of line panels, then the levels."""
    lines = [panel for panel in panels if panel.spec.draw == "lines"]
    named = {series.curve.label: None for panel in lines for series in panel.series}
    levels = {level.label: None for panel in lines for level in panel.levels}
    return [
        *(Line2D([], [], label=label, **looks[label].line) for label in looks if label in named),
        *(Line2D([], [], label=label, color=style.REFERENCE, lw=1.0, ls=(0, (4, 3))) for label in levels),
    ]
