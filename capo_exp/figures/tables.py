"""The numbers of a figure as text: CSV of what is drawn, and a table of them in Markdown and LaTeX."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from capo_exp.core.intervals import Estimate
from capo_exp.figures import tokens
from capo_exp.figures.panel import NAN, Panel, Series, cell_text, count_drawn, value_text

CSV_HEADING = ("panel", "curve", "x", "centre", "low", "high", "seeds")
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "\N{OPEN BOX}": r"\textvisiblespace{}",
})  # fmt: skip
MARKDOWN = str.maketrans({
    "\\": "\\\\", "|": r"\|", "*": r"\*", "_": r"\_", "`": r"\`", "[": r"\[", "]": r"\]", "\n": " ",
    "<": "&lt;", ">": "&gt;",
})  # fmt: skip


FORMULA = re.compile("\\s*[-=+@\uff0b\uff0d\uff1d\uff20]")  # the last four are as wide as Chinese
"""What makes a spreadsheet calculate with the cell that begins with it."""


@dataclass(frozen=True)
class TextTable:
    """Cells as people read them."""

    heading: list[str]
    rows: list[list[str]]


def plain(text: str) -> str:
    """Returns a text as one line that no spreadsheet calculates: an apostrophe is before it, if need be.

    Numbers stay numbers.
    """
    try:
        float(text)
    except ValueError:
        line = re.sub(r";(?=\s*['\"]?[-=+@\uff0b\uff0d\uff1d\uff20])", " ", re.sub(r"[\t\r\n]", " ", text))
        return f"'{line}" if FORMULA.match(line) else line
    return text.strip()


def csv_text(panels: Sequence[Panel]) -> str:
    """Returns every number that is drawn, and the lines and counts beside them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADING)
    for panel in panels:
        for row in _csv_rows(panel):
            writer.writerow([plain(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()


def _csv_rows(panel: Panel) -> Iterator[tuple[object, ...]]:
    """Yields the rows of one panel; an empty field stands where there is no number."""
    for name, series in [("", one) for one in panel.series] + list(panel.further):
        yield from _series_rows(f"{panel.title}: {name}" if name else panel.title, series)
    for level in panel.levels:
        yield panel.title, level.label, "", _exact(level.y), "", "", ""
    for curve, factor in panel.crossings:
        name = f"{curve.label} reaches {panel.levels[0].label}"
        yield panel.title, name, _exact(factor.method_x), _exact(factor.target), "", "", ""
    for column in panel.columns:
        for label, cell in column.cells.items():
            if panel.kind == "settings":
                yield panel.title, label, column.heading, cell_text(cell, column.unit), "", "", ""
            elif isinstance(cell, str):
                yield panel.title, f"{label}, {column.heading}", "", cell, "", "", ""
            elif column.unit in ("seconds", "times"):  # told beside what is drawn
                bounds = (NAN if bound is None else bound for bound in (cell.low, cell.high))
                yield panel.title, f"{label}, {column.heading}", "", *map(_exact, (cell.value, *bounds)), ""


def _series_rows(title: str, series: Series) -> Iterator[tuple[object, ...]]:
    numbers = zip(series.x, series.centre, series.low, series.high, series.seeds, strict=True)
    for x, centre, low, high, seeds in numbers:
        if np.isfinite(centre):
            place = x if isinstance(x, str) else _exact(x)
            yield title, series.curve.label, place, *map(_exact, (centre, low, high)), int(seeds)


def _exact(number: float) -> str:
    """Says all digits; 96 in place of 96.0."""
    value = float(number)
    if not np.isfinite(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def table_of(panels: Sequence[Panel]) -> TextTable:
    """Returns one row for each curve, or for each rejected token."""
    if any(panel.kind == "tokens" for panel in panels):
        return _token_table(panels)
    columns: dict[tuple[str, str], dict[str, Estimate | str]] = {}
    for column in (column for panel in panels for column in panel.columns):
        columns.setdefault((column.heading, column.unit), {}).update(column.cells)
    units = [(unit, cells) for (_, unit), cells in columns.items()]
    rows = [
        [plain(label), str(drawn), *(_cell(cells.get(label), unit) for unit, cells in units)]
        for label, drawn in count_drawn(panels).items()
    ]
    return TextTable(["curve", "seeds", *(plain(name) for name, _ in columns)], rows)


def _cell(cell: Estimate | str | None, unit: str) -> str:
    return plain(cell) if isinstance(cell, str) else cell_text(cell, unit)


def _token_table(panels: Sequence[Panel]) -> TextTable:
    rows = []
    for panel in panels:
        drawn, further = panel.series[0], dict(panel.further)
        names = (tokens.REJECTED, tokens.OCCURRENCES, tokens.OF_REJECTED, tokens.OF_ALL)
        counts = [further[name].centre for name in names]
        for name, share, gone, total, *shares in zip(drawn.x, drawn.centre, *counts, strict=True):
            cells = [value_text(value, "percent") for value in (share, *shares)]
            rows.append([plain(drawn.curve.label), plain(str(name)), f"{gone:.0f}", f"{total:.0f}", *cells])
    counted = ["rejected", "occurrences", "rejected of its occurrences", tokens.OF_REJECTED, tokens.OF_ALL]
    return TextTable(["curve", "token", *counted], rows)


def markdown(table: TextTable) -> str:
    """Returns a table of bars, with text in the first column to the left and numbers to the right."""
    cells = [[cell.translate(MARKDOWN) for cell in row] for row in (table.heading, *table.rows)]
    rule = ["---", *["---:"] * (len(table.heading) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (cells[0], rule, *cells[1:]))


def latex(table: TextTable) -> str:
    r"""Returns a plain tabular with \hline, for any document class; needs no package."""
    every = (table.heading, *table.rows)
    head, *body = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in every]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.heading) - 1)}}}"
    return "\n".join([begin, r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}", ""])
