"""A figure as a page: its panels beside each other, a legend above, and what a reader has to know below."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capo_exp.figures import style
from capo_exp.figures.curves import Curve, order
from capo_exp.figures.gallery import FIGURES
from capo_exp.figures.lines import legend_entries
from capo_exp.figures.panel import Panel
from capo_exp.figures.study import Lacking, Study
from capo_exp.runs import metrics as names

WIDTHS = {1: 6.2, 2: 9.0, 3: 12.0}
"""Inches of the page by columns; more columns are 3.6 each."""
LABEL_LETTER, LETTER, SMALL_LETTER = 0.08, 0.066, 0.062
"""Inches of a letter in an axis' labels, the legend and the footer, about."""
USUAL = 12
"""Letters of a curve's name that the widths have room for."""
LINE = 0.19
"""Inches of a line of it."""
INTERVALS = {
    "bootstrap": "95 % bootstrap interval over seeds",
    "t": "95 % interval of Student's t over seeds",
    "sem": "one standard error over seeds",
}
STATISTICS = {"mean": "mean", "iqm": "interquartile mean"}
MARKS = {"lines": "band: ", "bars": "whisker: "}
"""Kind of panel -> what shows the interval."""


@dataclass(frozen=True)
class Picture:
    """All that a figure shows."""

    name: str
    study: Study
    panels: tuple[Panel, ...]
    lacking: tuple[str, ...]
    """What was left out and why."""

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
    unlogged = [
        m.key if m.x == names.COMPLETIONS else f"{m.key} with {m.x}"
        for panel in empty
        if not panel.lack and (m := panel.named)
    ]
    metrics = [f"no run has logged {', '.join(dict.fromkeys(unlogged))}"] if unlogged else []
    reasons = [*dict.fromkeys(panel.lack for panel in empty if panel.lack), *metrics]
    if not panels:
        raise Lacking("; ".join(reasons))
    absent = [f"{panel.title}: not in {', '.join(panel.absent)}" for panel in panels if panel.absent]
    return Picture(name, study, panels, (*reasons, *absent))


def caption(picture: Picture) -> str:
    """Returns all sentences: seeds, band, smoothing, lines, and what is missing."""
    how, panels = footer(picture), [panel for panel in picture.panels if panel.kind == "lines"]
    levels = dict.fromkeys(level.label for panel in panels for level in panel.levels)
    early = dict.fromkeys(text for panel in panels for text in panel.early)
    study, first = picture.study, picture.curves[0]
    unanswered = study.reference is None and any(panel.wants_reference for panel in panels)
    sentences = {
        FIGURES[picture.name].caption: True,
        f"{how[0].upper()}{how[1:]}.": True,
        f"Dashed: {', '.join(levels)}.": levels,
        "No line of a reference: the runs have no conservative GRPO.": unanswered,
        "Ring and factor: the reference's x over that of the curve where each first reaches the line.":
            any(panel.crossings for panel in panels),
        "x = 0 of training accuracy: runs at learning rate 0.":
            any(study.start_of(first, panel.named) is not None for panel in panels),
        f"Seeds that end earlier than the others: {', '.join(early)}.": early,
        **{f"Left out: {text}.": True for text in picture.lacking},
    }  # fmt: skip
    return " ".join(sentence for sentence, holds in sentences.items() if sentence and holds)


def footer(picture: Picture) -> str:
    """Returns the shortest version, which stands in the picture itself."""
    kind, study = picture.panels[0].kind, picture.study
    if any(panel.kind == "lines" for panel in picture.panels):
        kind = "lines"
    if kind == "settings":
        return count_seeds(picture.curves)
    if kind == "tokens":
        return f"counted in the logged completions of {count_seeds(picture.curves)}"
    several = any(len(curve.runs) > 1 for curve in picture.curves)
    band = f"{MARKS.get(kind, '')}{INTERVALS[study.interval]}" if several else "one seed, hence no interval"
    text = f"{STATISTICS[study.statistic]} of {count_seeds(picture.curves)}; {band}; {_smoothing(picture)}"
    return text.removesuffix("; ")


def count_seeds(curves: Sequence[Curve]) -> str:
    """Says how many there are, such as `n = 5 seeds` or `n = 5 seeds (GRPO 3)`."""
    counts = {curve.label: len(curve.runs) for curve in curves}
    usual = max(counts.values(), key=list(counts.values()).count)
    others = [f"{label} {count}" for label, count in counts.items() if count != usual]
    return f"n = {usual} seed{'' if usual == 1 else 's'}" + (f" ({', '.join(others)})" if others else "")


def _smoothing(picture: Picture) -> str:
    """Says `EMA 0.1`, or `not smoothed`; one for each panel if they differ."""
    metrics = [panel.named for panel in picture.panels if panel.kind in ("lines", "bars", "heat")]
    said = {m.label: "not smoothed" if m.smoothing == 1 else f"EMA {m.smoothing:g}" for m in metrics}
    if len(set(said.values())) <= 1:
        return "".join(dict.fromkeys(said.values()))
    return ", ".join(f"{text} ({key})" for key, text in said.items())


def draw_page(picture: Picture) -> Figure:
    """Draws the whole page. No pyplot, no display."""
    looks, panels = style.looks(picture.curves), picture.panels
    columns = min(FIGURES[picture.name].columns, len(panels))
    rows = -(-len(panels) // columns)
    heights = [max(panel.height for panel in panels[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure = Figure(figsize=(_width(panels, columns), sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten())
    for spare in grid[len(panels) :]:
        spare.remove()
    marks: list[Any] = list(legend_entries(panels, looks))
    for place, panel in enumerate(panels):
        marks += panel.paint(grid[place], panel, panels, looks)
        left = panels[place - 1] if place % columns else None
        if left and panel.kind == left.kind == "bars" and _labels(panel) == _labels(left):
            grid[place].tick_params(axis="y", labelleft=False)  # the panel to the left has the same list
    if marks:
        _add_legend(figure, marks)
    lines = textwrap.fill(footer(picture), int(figure.get_figwidth() / SMALL_LETTER))
    figure.supxlabel(lines, x=0.005, ha="left", fontsize=7.5, color=style.OTHER, parse_math=False)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)  # once for all formats; with an engine every saving would draw twice
    figure.set_layout_engine(None)
    return figure


def _labels(panel: Panel) -> list[str]:
    return [series.curve.label for series in panel.series]


def _width(panels: Sequence[Panel], columns: int) -> float:
    """Returns the inches of the page."""
    if panels[0].kind == "settings":
        return 2.2 + 0.95 * len(panels[0].columns)
    listed = [label for panel in panels if panel.kind in ("bars", "stages") for label in _labels(panel)]
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


def as_bytes(figure: Figure, kind: str, metadata: Mapping[str, Any]) -> bytes:
    """Returns the page as png or pdf; the same page gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, metadata=dict(metadata))
    return out.getvalue()
