"""A figure as a page: its panels beside each other, a legend above, and what a reader has to know below."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from capo_exp.figures import style
from capo_exp.figures.bands import FEW_POINTS, in_evaluations
from capo_exp.figures.bars import cell_of
from capo_exp.figures.curves import Curve, order
from capo_exp.figures.gallery import FIGURES
from capo_exp.figures.labels import REGIMES, short
from capo_exp.figures.lines import legend_entries
from capo_exp.figures.panel import Panel, count_drawn, thousands
from capo_exp.figures.paper import grouped
from capo_exp.figures.study import Lacking, Study
from capo_exp.runs import metrics as names

WIDTHS = {1: 6.2, 2: 9.0, 3: 12.0}
"""Inches of the page by columns; more columns are 3.6 each."""
LABEL_LETTER, LETTER, SMALL_LETTER = 0.08, 0.066, 0.062
"""Inches of a letter in an axis' labels, the legend and the footer, about."""
USUAL = 12
"""Letters of a curve's name that the widths have room for."""
LINE, SMALL_LINE = 0.19, 0.125
"""Inches of a line of the legend and of the footer."""
INTERVALS = {
    "bootstrap": "95 % bootstrap interval over seeds",
    "t": "95 % interval of Student's t over seeds",
    "sem": "one standard error over seeds",
}
STATISTICS = {"mean": "Mean", "iqm": "Interquartile mean"}
SIGNS = {"lines": "band", "bars": "whisker", "heat": "small numbers", "stages": "brackets"}
"""Kind of panel -> what shows the interval."""


@dataclass(frozen=True)
class Picture:
    """All that a figure shows."""

    name: str
    study: Study
    panels: tuple[Panel, ...]
    lacking: tuple[str, ...]  # What was left out and why

    @property
    def title(self) -> str:
        """Returns the figure's title."""
        return FIGURES[self.name].title

    @property
    def curves(self) -> list[Curve]:
        """Returns the curves that are shown, in their order."""
        shown = {series.curve.label: series.curve for panel in self.panels for series in panel.series}
        return sorted(shown.values(), key=order)


def compose(name: str, study: Study, keys: Sequence[str] = ()) -> Picture:
    """Returns the panels of a figure that can be drawn.

    Raises:
        Lacking: none can; says why.
    """
    every = FIGURES[name].panels(study, keys) if keys else FIGURES[name].panels(study)
    panels = tuple(panel for panel in every if panel.series)
    empty = [panel for panel in every if not panel.series]
    absent_metrics = [panel.named for panel in empty if not panel.lack]
    unlogged = [m.key if m.x == names.COMPLETIONS else f"{m.key} with {m.x}" for m in absent_metrics]
    metrics = [f"no run has logged {', '.join(dict.fromkeys(unlogged))}"] if unlogged else []
    reasons = [*dict.fromkeys(panel.lack for panel in empty if panel.lack), *metrics]
    if not panels:
        raise Lacking("; ".join(reasons))
    missing = [
        (panel.title, [
            *panel.absent,
            *(f"{s.lost} of {len(s.curve.runs)} runs of {s.curve.label}" for s in panel.series if s.lost),
        ])
        for panel in panels
    ]  # fmt: skip
    absent = [f"{title}: not in {', '.join(those)}" for title, those in missing if those]
    runs = {s.curve.label: s.curve.runs for panel in panels for s in panel.series}
    damage = [text for same in runs.values() for run in same for text in run.left_out]
    return Picture(name, study, panels, (*reasons, *absent, *damage))


def caption(picture: Picture) -> str:
    """Returns what stands below the panels: seeds, intervals, smoothing, signs, and what is missing."""
    study, spec, panels = picture.study, FIGURES[picture.name], picture.panels
    curves = [panel for panel in panels if panel.kind == "lines"]
    unanswered = study.reference is None and any(panel.wants_reference for panel in panels)
    training = [panel.named for panel in curves if not in_evaluations(panel.named.key)]
    started = any(study.start_of(curve, m) is not None for m in training for curve in picture.curves)
    numbers = [panel for panel in panels if panel.kind in ("bars", "heat") and not curves]
    sentences = {
        spec.caption: True,
        _statistics(picture): True,
        "; ".join(_regimes(picture.curves)): True,
        _smoothing(panels): True,
        _levels(curves): True,
        "No line of a reference: the runs have no conservative GRPO": unanswered,
        "Ring and factor: the reference's x over that of the curve where each first reaches the line":
            any(panel.crossings for panel in panels),
        "Training accuracy at x = 0: of runs at learning rate 0": started,
        _losses(curves, "Cross: a seed ended there", ". Thin: fewer than half go on"): True,
        _losses(numbers, "A seed counts as far as it went", ""): True,
        **{f"Left out: {text}": True for text in picture.lacking},
    }  # fmt: skip
    said = [text.removesuffix(".") for text, holds in sentences.items() if text and holds]
    return " ".join(" ".join(f"{text[0].upper()}{text[1:]}." for text in said).split())


def _statistics(picture: Picture) -> str:
    kinds, study = {panel.kind for panel in picture.panels}, picture.study
    if "tokens" in kinds:
        counted = {panel.labels[0]: int(panel.series[0].seeds[0]) for panel in picture.panels}
        return f"Counted in the logged completions of {count_seeds(counted)}"
    counts = count_drawn(picture.panels)
    seeds = count_seeds(counts)
    if "settings" in kinds:
        return f"Of {seeds}"
    signs = " and ".join(sign for kind, sign in SIGNS.items() if kind in kinds)
    interval = (
        f"{signs}: {INTERVALS[study.interval]}" if max(counts.values()) > 1 else "one seed, hence no interval"
    )
    return f"{STATISTICS[study.statistic]} of {seeds}; {interval}"


def count_seeds(counts: Mapping[str, int]) -> str:
    """Says how many each curve has, by label, such as `n = 5 seeds` or `n = 5 seeds (GRPO 3)`."""
    usual = max(counts.values(), key=list(counts.values()).count)
    others = [f"{label} {count}" for label, count in counts.items() if count != usual]
    return f"n = {usual} seed{'' if usual == 1 else 's'}" + (f" ({', '.join(others)})" if others else "")


def _regimes(curves: Sequence[Curve]) -> Iterator[str]:
    names_of = grouped(curves, lambda curve: str(curve.run.setting("regime.name", "")))
    for regime, mine in names_of.items():
        mark, cells = REGIMES.get(regime, regime), sorted({cell_of(curve) for curve in mine})
        rate, batch = cells[0]
        if regime and rate:
            sizes = f", learning rate {short(rate)}, {batch:,} completions a step" if len(cells) == 1 else ""
            yield f"{f'({mark})' if mark else 'without a letter'}: {regime} regime{sizes}"


def _smoothing(panels: Sequence[Panel]) -> str:
    """Says `EMA 0.1` and what that is, or `not smoothed`; of which panels if they differ."""
    said: dict[str, dict[str, None]] = {}
    few = []
    for panel in (panel for panel in panels if panel.kind in ("lines", "bars", "heat")):
        weight, label = panel.named.smoothing, panel.named.label
        raw = [series for series in panel.series if series.unsmoothed]
        smooth = weight < 1 and any(series.unsmoothed < series.drawn for series in panel.series)
        said.setdefault(f"EMA {weight:g}" if smooth else "not smoothed", {})[label] = None
        few += [f"{series.curve.label} ({label})" for series in raw] if smooth else []
    texts = [text + (f" ({', '.join(labels)})" if len(said) > 1 else "") for text, labels in said.items()]
    text = ", ".join(texts)
    if "EMA" in text:
        text += f"{'; EMA' if len(said) > 1 else ''}: moving average in which a new value has that weight"
    listed = ", ".join(dict.fromkeys(few))
    return text + (f"; fewer than {FEW_POINTS} points are not smoothed: {listed}" if few else "")


def _levels(panels: Sequence[Panel]) -> str:
    said = {level.label: f"{level.label}{level.meaning}" for panel in panels for level in panel.levels}
    return f"Dashed: {'; '.join(said.values())}" if said else ""


def _losses(panels: Sequence[Panel], begin: str, end: str) -> str:
    """Says how many seeds of each curve go on from where, if some ended early."""
    said = {}
    every = [series for panel in panels for series in panel.series]
    for series in (one for one in every if one.losses):
        steps = [f"{count} from {thousands(x)}" for x, count in series.losses]
        steps = [*steps[:1], "...", steps[-1]] if len(steps) > 3 else steps
        said[series.curve.label] = f"{series.curve.label} {series.drawn}, {', '.join(steps)}"
    if not said:
        return ""
    stopped = any(one.stopped for one in every)
    rest = (
        "; stopped for want of reward, it counts as 0 from there, in evaluations as it was last"
        if stopped
        else ""
    )
    return f"{begin}{rest}; seeds that go on: {'; '.join(said.values())}{end}"


def draw_page(picture: Picture) -> Figure:
    """Draws the whole page. No pyplot, no display."""
    looks, panels = style.looks(picture.curves), picture.panels
    columns = min(FIGURES[picture.name].columns, len(panels))
    rows = -(-len(panels) // columns)
    heights = [max(panel.height for panel in panels[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure = Figure(figsize=(_width(panels, columns), sum(heights) + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten())
    for spare in grid[len(panels) :]:
        spare.remove()
    marks: list[Any] = list(legend_entries(panels, looks))
    for place, panel in enumerate(panels):
        panel.paint(grid[place], panel, panels, looks)
        marks += panel.marks
        if panel.kind != "settings":
            grid[place].set_title(panel.title, parse_math=False)
        left = panels[place - 1] if place % columns else None
        if left and panel.kind == left.kind == "bars" and panel.labels == left.labels:
            grid[place].tick_params(axis="y", labelleft=False)  # the panel to the left has the same list
    if marks:
        _add_legend(figure, marks)
    lines = textwrap.fill(caption(picture), int(figure.get_figwidth() / SMALL_LETTER))
    figure.set_figheight(figure.get_figheight() + SMALL_LINE * lines.count("\n"))
    figure.supxlabel(lines, x=0.005, ha="left", fontsize=7.5, color=style.OTHER, parse_math=False)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)  # once for all formats; with an engine every saving would draw twice
    figure.set_layout_engine(None)
    return figure


def _width(panels: Sequence[Panel], columns: int) -> float:
    if panels[0].kind == "settings":
        return 2.2 + 0.95 * len(panels[0].columns)
    listed = [label for panel in panels if panel.kind in ("bars", "stages") for label in panel.labels]
    beside = max(map(len, listed), default=0)  # names of a list take their room from its panel
    return WIDTHS.get(columns, 3.6 * columns) + LABEL_LETTER * max(0, beside - USUAL)


def _add_legend(figure: Figure, marks: Sequence[Any]) -> None:
    """Adds it above the panels, in as many columns as the page is wide; the page grows by its height."""
    longest = max(len(mark.get_label()) for mark in marks)
    room = figure.get_figwidth() / (0.68 + LETTER * longest)
    columns = max(1, min(len(marks), int(room)))
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(marks) // columns))
    legend = figure.legend(handles=list(marks), loc="outside upper left", ncols=columns, columnspacing=1.4)
    for text in legend.get_texts():
        text.set_parse_math(False)
