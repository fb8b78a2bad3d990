"""The families of one number for each curve: in a list, and on a grid of learning rate and batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb

from capo_exp.core.intervals import Estimate, seed_estimate
from capo_exp.figures import style
from capo_exp.figures.bands import Band
from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import is_safe, method, short
from capo_exp.figures.lines import reduced
from capo_exp.figures.panel import NAN, Column, Panel, format_values, list_rows, of_estimates, value_text
from capo_exp.figures.stats import Points, collapse, has_kept, lead, mean_height, points, share, worst
from capo_exp.figures.study import Metric, Study, subject
from capo_exp.figures.style import Look
from capo_exp.runs.read import Array

Measure = Literal[
    "final", "mean", "max", "worst", "auc", "last", "collapsed", "kept", "first_collapse", "lead",
    "until_good",
]  # fmt: skip
"""How a curve becomes one number: `final` reads their centre, the others each seed."""
GOOD = 0.9
"""Accuracy."""


def bars(
    study: Study, drawn: Sequence[Curve], metric: Metric, title: str, measure: Measure, heading: str = ""
) -> Panel:
    """Returns a panel with one number for each curve; `heading` names the table's column, not the title."""
    metric = study.settled(metric)
    found = study.bands_of(drawn, metric)
    shown = [curve for curve in drawn if curve.label in found]
    told = {c.label: _one_number(study, metric, c, found[c.label], measure) for c in shown}
    cells = {label: cell for label, (cell, _) in told.items()}
    numbers = {k: Estimate(NAN) if isinstance(cell, str) else cell for k, cell in cells.items()}
    return Panel(
        "bars", title, _paint_bars, metric=metric, height=0.85 + 0.27 * len(shown),
        series=tuple(
            of_estimates(c, [measure], [numbers[c.label]], told[c.label][1], found[c.label]) for c in shown
        ),
        columns=(Column(heading or title, metric.unit, cells),),
        absent=tuple(curve.label for curve in drawn if curve.label not in found),
    )  # fmt: skip


def _one_number(
    study: Study, metric: Metric, curve: Curve, found: Band, measure: Measure
) -> tuple[Estimate | str, int]:
    """Returns the number, or why there is none, and of how many seeds it is."""
    if measure == "final":
        return reduced(study, found, measure), int(found.count[found.end])
    if measure == "lead":
        return _lead(study, metric, curve)
    own, runs = list(_seeds(study, metric, curve).values()), len(curve.runs)
    if measure == "until_good":
        reached = [x[hit.argmax()] for x, y in own if (hit := y >= GOOD).any()]
        some = f"{len(reached)} of {runs} seeds"
        return study.over_seeds(np.array(reached)) if len(reached) == runs else some, len(own)
    first = study.start_of(curve, metric)
    start = float(found.centre[np.isfinite(found.centre)][0]) if first is None else first
    of: dict[str, Callable[[Array, Array], float]] = {
        "mean": lambda _, y: y.mean(), "max": lambda _, y: y.max(), "last": lambda _, y: y[-1],
        "worst": lambda _, y: worst(y, start), "auc": mean_height,
    }  # fmt: skip
    if measure in of:
        return study.over_seeds(np.array([of[measure](x, y) for x, y in own])), len(own)
    falls = [x for each in own if (x := collapse(*each, start, found.alpha)) is not None]
    if measure == "first_collapse":
        return (Estimate(float(np.median(falls))), len(falls)) if falls else ("none", 0)
    count = len(falls) if measure == "collapsed" else sum(has_kept(y) for _, y in own)
    return share(count, len(own)), len(own)


def _lead(study: Study, metric: Metric, curve: Curve) -> tuple[Estimate | str, int]:
    """Returns the area under a curve less that of the best plain GRPO of the same model, problems and batch
    outside the conservative regime, and of how many seeds: those of both, each over the x that both have.

    Its interval is Student's, whatever the figure's are: docs/study/criterion.md.
    """
    plain = [one for one in study.curves if method(one.run) == "GRPO" and not is_safe(one.run)]
    alike = [one for one in plain if subject(one.run) == subject(curve.run)]
    rivals = [one for one in alike if cell_of(one)[0] != 0 and cell_of(one)[1] == cell_of(curve)[1]]
    known = [(one, seeds) for one in rivals if (seeds := _seeds(study, metric, one))]
    if not known:
        return "no rival", 0
    own = _seeds(study, metric, curve)
    end = max((x[-1] for x, _ in own.values()), default=np.inf)

    def height(seeds: Mapping[int, Points]) -> float:
        """As far as the curve goes: later, a rival may have risen."""
        reach = [int(max(1, np.searchsorted(x, end, side="right"))) for x, _ in seeds.values()]
        cut = [(x[:n], y[:n]) for n, (x, y) in zip(reach, seeds.values(), strict=True)]
        return float(np.mean([mean_height(x, y) for x, y in cut]))

    best, theirs = max(known, key=lambda pair: height(pair[1]))
    if best.run.path == curve.run.path:
        return "the best rival", 0
    leads = np.array([lead(own[seed], theirs[seed]) for seed in sorted(own.keys() & theirs.keys())])
    leads = leads[np.isfinite(leads)]
    return (seed_estimate(leads, study.statistic, "t") if len(leads) else "no seed in common"), len(leads)


def _seeds(study: Study, metric: Metric, curve: Curve) -> dict[int, Points]:
    """Returns each seed's own curve, of those that have one."""
    alone = {run.setting("seed"): study.band(replace(curve, runs=(run,)), metric) for run in curve.runs}
    return {seed: points(band)[0] for seed, band in alone.items() if band}


def _paint_bars(axes: Axes, panel: Panel, panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    axes.set(xlabel=panel.named.label)
    if panel.is_log:
        axes.set_xscale("log")
    for place, series in zip(list_rows(axes, panel.labels), panel.series, strict=True):
        look, value = looks[series.curve.label], float(series.centre[0])
        if not np.isfinite(value):
            across = axes.get_yaxis_transform()
            reason = panel.columns[0].cells[series.curve.label]
            axes.text(0.02, place, str(reason), transform=across, va="center", color=style.OTHER)
            continue
        if np.isfinite(series.low[0]):
            axes.plot([series.low[0], series.high[0]], [place, place], color=look.colour, lw=2.2, alpha=0.55)
        axes.plot(value, place, **{**look.line, "markersize": 7}, clip_on=False)
    format_values(axes.xaxis, panel.named.unit, log=panel.is_log)
    axes.set_xlim(*panel.named.limits)
    if not any(np.isfinite(series.centre[0]) for series in panel.series):
        axes.set_xticks([])


def cell_of(curve: Curve) -> tuple[float, int]:
    """Returns the learning rate, and the completions a step."""
    keys = ("learning_rate", "prompts_per_step", "group_size")
    rate, prompts, group = (curve.run.setting(f"regime.{key}", 0) for key in keys)
    return float(rate), int(prompts * group)


def heat(study: Study, drawn: Sequence[Curve], metric: Metric, title: str, measure: Measure) -> Panel:
    """Returns a panel with one number for each learning rate and batch; arguments as of `bars`."""
    cells: dict[tuple[float, int], str] = {}
    for curve in drawn:
        if (other := cells.setdefault(cell_of(curve), curve.label)) != curve.label:
            lack = f"{other} and {curve.label} have the same learning rate and batch; narrow runs="
            return Panel("heat", title, _paint_heat, lack=lack)
    listed = bars(study, drawn, metric, title, measure, f"{metric.label}, {measure}")
    return replace(listed, kind="heat", paint=_paint_heat, height=2.3)


def _paint_heat(axes: Axes, panel: Panel, panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    """Draws learning rate up, completions a step to the right; cells without runs are hatched.

    The heat maps of a figure have both axes and the scale in common.
    """
    every, unit = [series for panel in panels for series in panel.series], panel.named.unit
    rates, batches = (sorted(set(axis)) for axis in zip(*(cell_of(s.curve) for s in every), strict=True))
    values = [float(series.centre[0]) for series in every]
    norm = Normalize(min(values), max(values))
    axes.set_facecolor("#F3F3F3")
    axes.patch.set(hatch="////", edgecolor="#CFCFCF")
    for series in panel.series:
        rate, batch = cell_of(series.curve)
        x, y, value = batches.index(batch), rates.index(rate), float(series.centre[0])
        face = mpl.colormaps[style.HEAT](norm(value))
        axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color=face)
        ink = ink_on(face[:3])
        seeds = bool(np.isfinite(series.low[0]))  # their interval is the cell's second line
        above = "bottom" if seeds else "center"
        axes.text(x, y, value_text(value, unit), ha="center", va=above, color=ink, fontsize=9)
        if seeds:
            bounds = (float(series.low[0]), float(series.high[0]))
            spread = " to ".join(value_text(bound, unit, bare=True) for bound in bounds)
            axes.text(x, y - 0.06, spread, ha="center", va="top", color=ink, fontsize=7)
    axes.set(xlabel="completions a step", ylabel="learning rate")
    axes.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axes.set_yticks(range(len(rates)), [short(rate) for rate in rates])
    axes.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(rates) - 0.5))
    axes.grid(False)
    axes.tick_params(length=0)


def ink_on(face: Any) -> str:
    """Returns black or white, whichever can be read: by the grey of print, Rec. 709 of sRGB's values."""
    return "black" if np.dot(to_rgb(face), (0.2126, 0.7152, 0.0722)) > 0.4 else "white"
