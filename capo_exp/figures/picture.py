"""Panels beside each other on one page, and that page as PNG and PDF. No pyplot, no display."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capo_exp.figures import charts, panels, style
from capo_exp.figures.catalogue import defaults
from capo_exp.figures.compose import Picture
from capo_exp.figures.measure import Panel
from capo_exp.figures.study import Study, x_of
from capo_exp.figures.style import Look

WIDTHS = {1: 6.2, 2: 9.0, 3: 12.0}
"""Inches of the page by columns; more columns are 3.6 each."""
LABEL_LETTER, LETTER, SMALL_LETTER = 0.08, 0.066, 0.062
"""Inches of a letter in an axis' labels, the legend and the footer, about."""
USUAL = 12
"""Letters of a curve's name that the widths have room for."""
LINE = 0.19
"""Inches of a line of it."""


def draw(picture: Picture, study: Study, footer: str) -> Figure:
    """The whole page."""
    looks = style.looks([(c.label, c.algorithm, c.regime) for c in picture.curves])
    columns = min(picture.spec.columns, len(picture.panels))
    rows = -(-len(picture.panels) // columns)
    heights = [max(map(height, picture.panels[i * columns : (i + 1) * columns])) for i in range(rows)]
    figure = Figure(figsize=(width(picture, columns), sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for spare in grid[len(picture.panels) :]:
        spare.remove()
    marks = draw_panels(picture, study, list(grid), looks)
    if marks:
        add_legend(figure, marks)
    lines = textwrap.fill(footer, int(figure.get_figwidth() / SMALL_LETTER))
    figure.supxlabel(lines, x=0.005, ha="left", fontsize=7.5, color=style.OTHER, parse_math=False)
    lay_out(figure)
    return figure


def lay_out(figure: Figure) -> None:
    """Once for all formats; with an engine every saving would draw twice."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)


def width(picture: Picture, columns: int) -> float:
    """Inches of the page."""
    if picture.panels[0].spec.draw == "settings":
        return 2.2 + 0.95 * len(picture.panels[0].columns)
    names = [s.curve.label for p in picture.panels if p.spec.draw in ("bars", "stages") for s in p.series]
    beside = max(map(len, names), default=0)  # names of a list take their room from its panel
    return WIDTHS.get(columns, 3.6 * columns) + LABEL_LETTER * max(0, beside - USUAL)


def height(panel: Panel) -> float:
    """Inches of a panel."""
    entries = len(panel.series)
    return {
        "lines": 3.1,
        "bars": 0.85 + 0.27 * entries,
        "stages": 0.9 + 0.36 * entries,
        "heat": 2.3,
        "tokens": 0.9 + 0.19 * max(len(series.x) for series in panel.series),
        "settings": 0.3 + 0.27 * (1 + entries),
    }[panel.spec.draw]


def draw_panels(picture: Picture, study: Study, grid: Sequence[Axes], looks: Mapping[str, Look]) -> list[Any]:
    """Draws each on its axes; returns what the legend has to explain."""
    heat = [panel for panel in picture.panels if panel.spec.draw == "heat"]
    shared = charts.grid_of(heat) if heat else None
    marks: list[Any] = panels.handles(picture.panels, looks)
    for place, (axes, panel) in enumerate(zip(grid, picture.panels, strict=False)):
        match panel.spec.draw:
            case "lines":
                x = x_of(study, panel.spec)
                panels.draw_lines(axes, panel, looks, defaults()["x_labels"].get(x, x))
            case "bars":
                charts.draw_bars(axes, panel, looks, named=not is_named(picture, place))
            case "stages":
                marks += charts.draw_stages(axes, panel)
            case "heat":
                assert shared is not None
                charts.draw_heat(axes, panel, shared)
            case "tokens":
                charts.draw_tokens(axes, panel, looks)
            case "settings":
                charts.draw_settings(axes, panel)
    return marks


def is_named(picture: Picture, place: int) -> bool:
    """Whether the panel to the left has the same list of curves, with their names."""
    if place % picture.spec.columns == 0:
        return False
    left, here = picture.panels[place - 1 : place + 1]
    same = [one.curve.label for one in left.series] == [one.curve.label for one in here.series]
    return left.spec.draw == here.spec.draw and same


def add_legend(figure: Figure, marks: Sequence[Any]) -> None:
    """Above the panels, in as many columns as the page is wide; the page grows by its height."""
    longest = max(len(mark.get_label()) for mark in marks)
    room = figure.get_figwidth() / (0.68 + LETTER * longest)
    columns = max(1, min(len(marks), int(room)))
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(marks) // columns))
    legend = figure.legend(handles=list(marks), loc="outside upper left", ncols=columns, columnspacing=1.4)
    for text in legend.get_texts():
        text.set_parse_math(False)


def as_bytes(figure: Figure, kind: str, metadata: Mapping[str, Any]) -> bytes:
    """The page as png or pdf; the same page gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, metadata=dict(metadata))
    return out.getvalue()
