"""Numbers as text: cells, Markdown, LaTeX, CSV."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from capo_exp.core.intervals import Estimate
from capo_exp.figures import tables, tokens
from capo_exp.figures.curves import Curve
from capo_exp.figures.panel import (
    Column,
    Level,
    Panel,
    Series,
    cell_text,
    label_levels,
    thousands,
    value_text,
)
from capo_exp.figures.paper import TRAINING
from capo_exp.figures.stats import Factor
from capo_exp.figures.tables import TextTable
from capo_exp.runs.read import LoggedRun

NAN = float("nan")


def curve(label, runs=2):
    return Curve(label, tuple(LoggedRun(Path(f"{label}{i}"), {}, {}, [], []) for i in range(runs)))


def series(label, x, centre, low, runs=2):
    bounds = np.array(low)
    return Series(curve(label, runs), x, np.array(centre), bounds, bounds + 1, np.full(len(centre), runs))


def panel(*shown, **more):
    return Panel("lines", "Accuracy", lambda *_: [], shown, TRAINING, **more)


@pytest.mark.parametrize(
    ("cell", "unit", "text"),
    [
        (Estimate(0.7131, 0.68, 0.745), "percent", "71.3 % [68.0, 74.5]"),
        (Estimate(0.7131), "percent", "71.3 %"), (Estimate(19.5, 0.0, 31.25), "times", "19.5x [0, 31.2]"),
        (Estimate(1.234, 1.0, 2.0), "seconds", "1.23 s [1, 2]"),
        (Estimate(5.691e-6, 1e-7, 0.25), "number", "5.69e-6 [1e-7, 0.25]"),
        (Estimate(-0.0123), "number", "-0.0123"), (Estimate(1234567.0), "number", "1.23e6"),
        (Estimate(3456.0), "completions", "3.46k"), ("not reached", "times", "not reached"),
        (None, "percent", ""), (Estimate(NAN), "percent", ""),
    ],
)  # fmt: skip
def test_cells(cell, unit, text):
    assert cell_text(cell, unit) == text


def test_numbers_of_completions():
    said = [thousands(x) for x in (0, 96, 999, 999.6, 1000, 59904, 999_600, 1.5e6)]
    assert said == ["0", "96", "999", "1k", "1k", "59.9k", "1M", "1.5M"]
    assert value_text(0.5, "percent", bare=True) == "50.0"


def test_labels_of_levels_stand_apart():
    axes = Figure().subplots()
    label_levels(axes, [(y, "", "k") for y in (0.5, 0.1, 0.52, 0.11)])
    assert [text.xy[1] for text in axes.texts] == pytest.approx([0.1, 0.16, 0.5, 0.56])


def test_markdown_escapes_what_would_end_a_cell():
    text = tables.markdown(TextTable(["curve", "n|m"], [["a|b *c* <i> `x` m_F ![](y) \\", "1\n2"]]))
    assert text.splitlines() == [
        r"| curve | n\|m |",
        "| --- | ---: |",
        r"| a\|b \*c\* &lt;i&gt; \`x\` m\_F !\[\](y) \\ | 1 2 |",
    ]


def test_latex_escapes_every_special_character():
    text = tables.latex(TextTable(["curve", "50 %"], [["a_b & $c$ {#} ~^\\ <>|", "␣x"]]))
    assert text == (
        "\\begin{tabular}{lr}\n\\hline\ncurve & 50 \\% \\\\\n\\hline\n"
        "a\\_b \\& \\$c\\$ \\{\\#\\} \\textasciitilde{}\\textasciicircum{}\\textbackslash{} "
        "\\textless{}\\textgreater{}\\textbar{} & \\textvisiblespace{}x \\\\\n"
        "\\hline\n\\end{tabular}\n"
    )


def test_csv_has_every_digit_and_no_number_that_is_not_there():
    one = series('a "b", c', np.array([96.0, 192.0, 288.0]), [1 / 3, NAN, 2.0], [NAN, NAN, 0.5])
    shown = panel(
        one, levels=(Level("GRPO at 2k", 0.5),), crossings=((one.curve, Factor(0.5, 96.0, 3.0, NAN, NAN)),)
    )
    assert list(csv.reader(io.StringIO(tables.csv_text([shown])))) == [
        ["panel", "curve", "x", "centre", "low", "high", "seeds"],
        ["Accuracy", 'a "b", c', "96", "0.3333333333333333", "", "", "2"],
        ["Accuracy", 'a "b", c', "288", "2", "0.5", "1.5", "2"],
        ["Accuracy", "GRPO at 2k", "", "0.5", "", "", ""],
        ["Accuracy", 'a "b", c reaches GRPO at 2k', "96", "0.5", "", "", ""],
    ]


@pytest.mark.parametrize(
    "text", ["=1+1", "+x", "-x", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "-", "\uff1d1"]
)
def test_no_cell_of_a_config_is_a_formula(text):
    """Wherever it comes from: names of curves, of panels and metrics, settings, tokens, levels."""
    one = series(text, [text], [1.0], [NAN])
    columns = (Column(text, "text", {text: text}),)
    kinds: list[Any] = ["lines", "settings"]
    shown = [
        Panel(kind, text, lambda *_: [], (one,), TRAINING, columns=columns, levels=(Level(text, 0.5),))
        for kind in kinds
    ]
    cells = [cell for row in csv.reader(io.StringIO(tables.csv_text(shown))) for cell in row]
    table = tables.table_of(shown)
    cells += [cell for row in (table.heading, *table.rows) for cell in row]
    said = f"'{text}".translate(dict.fromkeys(map(ord, "\t\r\n"), " "))  # of one line
    assert cells.count(said if text != "\r1" else " 1") == 19 and text not in cells


def test_numbers_stay_numbers():
    numbers = ["-0.5", "+3", "-1e-4", "-inf", "", "a=b", "71 %", "1-2", "a; b"]
    assert [tables.plain(text) for text in numbers] == numbers
    assert tables.plain("L;=1+1") == "L =1+1"
    column = {"a": Estimate(-0.308, -0.56, -0.11)}
    table = tables.table_of(
        [panel(series("a", np.array([1.0]), [1.0], [NAN]), columns=(Column("x", "percent", column),))]
    )
    assert table.rows == [["a", "2", "-30.8 % [-56.0, -11.0]"]]


def test_the_summary_joins_the_panels_by_curve():
    a, b = series("a", np.array([1.0]), [1.0], [NAN]), series("b", np.array([1.0]), [1.0], [NAN], runs=3)
    first = panel(a, b, columns=(Column("final", "percent", {"a": Estimate(0.5)}),))
    second = panel(
        b, columns=(Column("final", "percent", {"b": Estimate(0.25)}), Column("n", "text", {"b": "x"}))
    )
    assert ["Accuracy", "b, n", "", "x", "", "", ""] in csv.reader(io.StringIO(tables.csv_text([second])))
    table = tables.table_of([first, second])
    assert table.heading == ["curve", "seeds", "final", "n"]
    assert table.rows == [["a", "2", "50.0 %", ""], ["b", "3", "25.0 %", "x"]]


def test_tokens_can_be_seen():
    said = [tokens.visible(text) for text in (" a", "\n", "数", "é|", "'")]
    assert said == ["␣a", "\\n", "\\u6570", "\\xe9|", "'"]
