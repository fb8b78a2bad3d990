"""What one pair of axes shows: its numbers, and the function that draws them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, ScalarFormatter
from numpy.typing import NDArray

from capo_exp.core.intervals import Estimate
from capo_exp.figures.bands import Band
from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import short
from capo_exp.figures.stats import Factor
from capo_exp.figures.study import Metric
from capo_exp.figures.style import Look
from capo_exp.runs.read import Array

Kind = Literal["lines", "bars", "heat", "stages", "tokens", "settings"]
Painter = Callable[[Axes, "Panel", Sequence["Panel"], Mapping[str, Look]], None]
"""Draws a panel on axes, all but its title, given all panels of the figure and the looks by label."""
NAN = float("nan")
LABEL_GAP = 0.06
"""Share of the height of axes that a line of small letters takes, about."""


@dataclass(frozen=True)
class Series:
    """What is drawn of one curve, and a block of rows of the CSV; all but the curve is [n]."""

    curve: Curve
    x: Array | list[str]
    centre: Array
    low: Array  # NaN where there is no interval, and so is high
    high: Array
    seeds: NDArray[Any]  # How many are behind each number
    losses: tuple[tuple[float, int], ...] = ()  # Where seeds end early: x, and how many go on
    stopped: bool = False
    """Whether the seeds that ended have values beyond: those of a run that was stopped for want of reward."""
    unsmoothed: int = 0  # Seeds with too few points to be smoothed
    lost: int = 0  # Runs of the curve without the metric

    @property
    def drawn(self) -> int:
        """Returns how many runs of the curve have the metric."""
        return len(self.curve.runs) - self.lost

    @property
    def numbers(self) -> Array:
        """Returns x where it is not names."""
        return np.asarray(self.x, dtype=np.float64)


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    label: str
    y: float
    meaning: str = ""
    """What the caption says after the label."""


@dataclass(frozen=True)
class Column:
    """One column of the table: a cell for each curve that has one, by its label."""

    heading: str
    unit: str
    cells: Mapping[str, Estimate | str]


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows; without series, why there are none."""

    kind: Kind
    title: str
    paint: Painter
    series: tuple[Series, ...] = ()
    metric: Metric | None = None  # Settled: smoothing and x as they were used
    height: float = 0.0  # Inches
    columns: tuple[Column, ...] = ()
    levels: tuple[Level, ...] = ()
    crossings: tuple[tuple[Curve, Factor], ...] = ()  # Curves that reach the reference's line
    wants_reference: bool = False
    further: tuple[tuple[str, Series], ...] = ()  # Numbers beside the drawn ones, with their names
    x_max: float | None = None
    marks: tuple[Patch, ...] = ()  # What the legend explains of it
    absent: tuple[str, ...] = ()  # Labels of curves that lack the metric
    lack: str = ""
    """Why there is nothing to draw, unless it is that no run has logged the metric."""

    @property
    def labels(self) -> list[str]:
        """Returns the names of the curves that are drawn."""
        return [series.curve.label for series in self.series]

    @property
    def named(self) -> Metric:
        """Returns the metric of a panel that is about one."""
        assert self.metric is not None
        return self.metric

    @property
    def is_log(self) -> bool:
        """Returns whether the values' axis is logarithmic: they span a decade, as good ticks need."""
        found = np.concatenate([series.centre for series in self.series])
        found = found[found > 0]
        return self.named.log and len(found) > 0 and bool(found.max() >= 10 * found.min())


def of_estimates(
    curve: Curve, x: list[str], estimates: Sequence[Estimate], seeds: int, band: Band | None = None
) -> Series:
    """Returns a series of n named numbers, each from as many seeds, of the curve's band if it has one."""
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates], dtype=np.float64).T
    return Series(curve, x, value, low, high, np.full(len(x), seeds), **_of_band(curve, band, seeds))


def of_band(curve: Curve, band: Band) -> Series:
    """Returns a curve over x."""
    return Series(curve, band.x, band.centre, band.low, band.high, band.count, **_of_band(curve, band))


def _of_band(curve: Curve, band: Band | None, seeds: int = 0) -> dict[str, Any]:
    if band is None:
        return {"lost": len(curve.runs) - seeds}
    told = {"losses": tuple(band.losses), "stopped": band.stopped, "unsmoothed": band.unsmoothed}
    return told | {"lost": len(curve.runs) - band.seeds}


def count_drawn(panels: Sequence[Panel]) -> dict[str, int]:
    """Returns how many runs of each curve are drawn, by label; those of the panel that has most of them."""
    every = [series for panel in panels for series in panel.series]
    return {one.curve.label: max(s.drawn for s in every if s.curve.label == one.curve.label) for one in every}


def thousands(x: float) -> str:
    """Says a number in few characters, such as 59.9k."""
    unit, size = (1e6, "M") if abs(x) >= 999_500 else (1e3, "k") if abs(x) >= 999.5 else (1, "")
    return f"{x / unit:.3g}{size}"


def value_text(value: float, unit: str, *, bare: bool = False) -> str:
    """Says a number to three digits or so; bare = without its unit."""
    if not np.isfinite(value):
        return ""
    if unit in ("percent", "points"):
        return f"{100 * value:.1f}" + (" %" if unit == "percent" and not bare else "")
    if unit == "completions":
        return thousands(value)
    after = {"seconds": " s", "times": "x"}.get(unit, "")
    small = 0 < abs(value) < 1e-3
    text = short(float(f"{value:.2e}")) if small else f"{value:.3g}".replace("e+0", "e")
    return text + ("" if bare else after)


def cell_text(cell: Estimate | str | None, unit: str) -> str:
    """Says a number with its interval, such as `71.3 % [68.0, 74.5]`."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    text = value_text(cell.value, unit)
    if cell.low is None or cell.high is None:
        return text
    return f"{text} [{', '.join(value_text(bound, unit, bare=True) for bound in (cell.low, cell.high))}]"


def format_values(axis: Axis, unit: str, *, log: bool = False) -> None:
    """Gives an axis the ticks of a unit."""
    if unit in ("percent", "points"):
        sign = "%" if unit == "percent" else ""
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}{sign}"))
    elif unit == "number" and not log:
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((-2, 4))  # a power of ten above the axis where numbers are small or large
        axis.set_major_formatter(formatter)
    elif unit == "completions":
        axis.set_major_formatter(EngFormatter(sep=""))


def label_levels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes texts at the right of the axes, each at its y, or as near above as its neighbours leave room.

    Each label is its y, its text and its colour. Call it when the limits are settled.
    """
    to_axes, before = axes.transData + axes.transAxes.inverted(), -np.inf
    for y, text, colour in sorted(labels):
        before = max(float(to_axes.transform((axes.get_xlim()[1], y))[1]), before + LABEL_GAP)
        axes.annotate(
            text, (1, before), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, color=colour,
        )  # fmt: skip


def list_rows(axes: Axes, names: Sequence[str]) -> Array:
    """Makes the y axis a list, read from the top; returns the places of its entries."""
    places = np.arange(len(names), dtype=np.float64)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    return places
