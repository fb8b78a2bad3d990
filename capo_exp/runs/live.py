"""The live table of a run on a terminal: where it is, and its curves in one line each."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from capo_exp.runs import metrics as names
from capo_exp.runs.read import LoggedRow

CURVES = {
    names.TRAIN_ACCURACY: ("accuracy", "{:.1%}"),
    names.EVAL_ACCURACY: ("held-out", "{:.1%}"),
    names.REJECTION_RATE: ("rejected", "{:.2%}"),
    names.ENTROPY: ("entropy", "{:.3f}"),
    names.COMPLETION_LENGTH: ("length", "{:.1f}"),
    names.STEP_SCALE: ("step scale", "{:.3f}"),
}
"""Metric -> its title and form. What has no value yet is left out, and so is a step scale that stays 1."""

WIDTH = 32
"""Values of a curve that are shown, the last ones."""
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


def live_table(
    rows: Sequence[LoggedRow], step: int, total: int, pace: str, *, plain: bool = False
) -> RenderableType:
    """Returns the progress, and of each curve the last value, the last WIDTH values and their range.

    Args:
        rows: logged so far, training and evaluations, in their order.
        step: rollout steps done.
        total: rollout steps of the run.
        pace: what stands behind the bar.
        plain: whether the terminal has no block elements.
    """
    head = Table.grid(padding=(0, 2))
    head.add_row(f"step {step:,}/{total:,}", ProgressBar(total=total, completed=step, width=24), pace)
    curves = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left", "left"):
        curves.add_column(justify=justify, no_wrap=True)
    for key, (title, form) in CURVES.items():
        values = [value for row in rows if (value := row.get(key)) is not None and math.isfinite(value)]
        if not values or (key == names.STEP_SCALE and set(values) == {1.0}):
            continue
        last = values[-WIDTH:]
        low, high = form.format(min(last)), form.format(max(last))
        span = low if low == high else f"{low} to {high}"
        curves.add_row(title, form.format(last[-1]), sparkline(last, plain=plain), Text(span, style="dim"))
    return Group(head, curves)


def sparkline(values: Sequence[float], *, plain: bool = False) -> str:
    """Returns a bar for each value, from the lowest to the highest of them; equal ones are all lowest."""
    bars = PLAIN_BARS if plain else BARS
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)
