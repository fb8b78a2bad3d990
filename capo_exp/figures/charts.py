"""Numbers of a panel -> axes, for the kinds without an x axis: bars, stages, heat maps, tokens, settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox

from capo_exp.figures import labels, style
from capo_exp.figures.measure import Panel, y_label
from capo_exp.figures.panels import format_values, is_log
from capo_exp.figures.per_run import cell_of
from capo_exp.figures.style import Look
from capo_exp.figures.tables import cell_text, value_text
from capo_exp.runs.read import Array


def rows_of(axes: Axes, names: Sequence[str]) -> Array:
    """Makes the y axis a list, read from the top; returns the places of its entries."""
    places = np.arange(len(names), dtype=np.float64)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    return places


def draw_bars(axes: Axes, panel: Panel, looks: Mapping[str, Look], *, named: bool) -> None:
    """One number with its interval for each curve; named = with the curves' names."""
    axes.set(title=panel.title, xlabel=y_label(panel.spec))
    if is_log(panel):
        axes.set_xscale("log")
    for place, series in zip(rows_of(axes, [s.curve.label for s in panel.series]), panel.series, strict=True):
        look, value = looks[series.curve.label], float(series.centre[0])
        if not np.isfinite(value):
            across = axes.get_yaxis_transform()
            axes.text(0.02, place, "none", transform=across, va="center", color=style.OTHER)
            continue
        if np.isfinite(series.low[0]):
            axes.plot([series.low[0], series.high[0]], [place, place], color=look.colour, lw=2.2, alpha=0.55)
        axes.plot(value, place, **{**look.line, "markersize": 7}, clip_on=False)
    axes.tick_params(axis="y", labelleft=named)
    format_values(axes.xaxis, panel)
    axes.set_xlim(*panel.spec.y_limits)
    if not any(np.isfinite(series.centre[0]) for series in panel.series):
        axes.set_xticks([])


def draw_stages(axes: Axes, panel: Panel) -> list[Patch]:
    """Shares of one whole beside each other; returns what a legend has to explain."""
    names = [str(name) for name in panel.series[0].x]
    every = [*panel.spec.keys, "other"]
    faces = [style.STAGES[every.index(name) % len(style.STAGES)] for name in names]
    places = rows_of(axes, [series.curve.label for series in panel.series])
    for place, series in zip(places, panel.series, strict=True):
        left = 0.0
        for share, face in zip(series.centre, faces, strict=True):
            axes.barh(place, share, 0.62, left=left, color=face, edgecolor=style.REFERENCE, linewidth=0.5)
            if share > 0.05:
                middle = {"ha": "center", "va": "center", "fontsize": 8, "color": ink_on(face)}
                axes.text(left + share / 2, place, f"{share:.0%}", **middle)
            left += float(share)
        cell = panel.columns[0].cells[series.curve.label]
        seconds = cell if isinstance(cell, str) else f"{cell.value:.3g} s"
        axes.text(1.01, place, seconds, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set(title=panel.title, xlabel="share of a rollout step; at the right its seconds", xlim=(0, 1))
    format_values(axes.xaxis, panel)
    edge = {"edgecolor": style.REFERENCE, "linewidth": 0.5}
    return [Patch(label=name, facecolor=face, **edge) for name, face in zip(names, faces, strict=True)]


def ink_on(face: Any) -> str:
    """Black or white, whichever can be read."""
    return "black" if luminance(face) > 0.4 else "white"


def luminance(colour: Any) -> float:
    """0 black to 1 white, as grey print has it (Rec. 709 of sRGB's values)."""
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


@dataclass(frozen=True)
class Grid:
    """What the heat maps of a figure have in common."""

    rates: list[float]
    batches: list[int]
    norm: Normalize


def grid_of(panels: Sequence[Panel]) -> Grid:
    """Over all panels, so that they can be compared."""
    every = [series for panel in panels for series in panel.series]
    cells = [cell_of(series.curve) for series in every]
    values = [float(series.centre[0]) for series in every]
    norm = Normalize(min(values), max(values))
    return Grid(sorted({rate for rate, _ in cells}), sorted({batch for _, batch in cells}), norm)


def draw_heat(axes: Axes, panel: Panel, grid: Grid) -> None:
    """Learning rate up, completions a step to the right; cells without runs are hatched."""
    axes.set_facecolor("#F3F3F3")
    axes.patch.set(hatch="////", edgecolor="#CFCFCF")
    for series in panel.series:
        rate, batch = cell_of(series.curve)
        x, y, value = grid.batches.index(batch), grid.rates.index(rate), float(series.centre[0])
        face = mpl.colormaps[style.HEAT](grid.norm(value))
        axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color=face)
        ink = ink_on(face[:3])
        seeds = bool(np.isfinite(series.low[0]))  # their interval is the cell's second line
        above = "bottom" if seeds else "center"
        axes.text(x, y, value_text(value, panel.spec.unit), ha="center", va=above, color=ink, fontsize=9)
        if seeds:
            bounds = (float(series.low[0]), float(series.high[0]))
            spread = " to ".join(value_text(bound, panel.spec.unit, bare=True) for bound in bounds)
            axes.text(x, y - 0.06, spread, ha="center", va="top", color=ink, fontsize=7)
    axes.set(title=panel.title, xlabel="completions a step", ylabel="learning rate")
    axes.set_xticks(range(len(grid.batches)), [f"{batch:,}" for batch in grid.batches])
    axes.set_yticks(range(len(grid.rates)), [labels.short(rate) for rate in grid.rates])
    axes.set(xlim=(-0.5, len(grid.batches) - 0.5), ylim=(-0.5, len(grid.rates) - 0.5))
    axes.grid(False)
    axes.tick_params(length=0)


def draw_tokens(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    """The tokens rejected most often, with the share of their occurrences."""
    series = panel.series[0]
    counts = dict(panel.further)
    places = rows_of(axes, list(series.x))
    axes.barh(places, series.centre, 0.72, color=looks[series.curve.label].colour, alpha=0.75)
    pairs = zip(counts["rejected occurrences"].centre, counts["occurrences"].centre, strict=True)
    for place, share, (gone, total) in zip(places, series.centre, pairs, strict=True):
        axes.annotate(
            f"{gone:.0f} of {total:.0f}", (share, place), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=style.OTHER,
        )  # fmt: skip
    axes.tick_params(axis="y", labelsize=8, labelfontfamily="monospace")
    axes.set(title=panel.title, xlabel=y_label(panel.spec), xlim=(0, 1.35 * float(series.centre.max())))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1])
    format_values(axes.xaxis, panel)


def draw_settings(axes: Axes, panel: Panel) -> None:
    """The table as a picture."""
    axes.axis("off")
    names = [series.curve.label for series in panel.series]
    cells = [[cell_text(column.cells[name], column.unit) for column in panel.columns] for name in names]
    drawn = axes.table(
        cells, rowLabels=names, colLabels=[column.heading for column in panel.columns],
        edges="horizontal", loc="center", cellLoc="right", colLoc="right", rowLoc="left", bbox=Bbox.unit(),
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8.5)
    for cell in drawn.get_celld().values():
        cell.set_edgecolor("#BBBBBB")
        cell.get_text().set_parse_math(False)
