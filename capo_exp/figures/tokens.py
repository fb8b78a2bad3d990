"""The family of rejected tokens, counted in the completions that runs have logged."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.axes import Axes

from capo_exp.figures import style
from capo_exp.figures.curves import Curve
from capo_exp.figures.panel import NAN, Panel, Series, format_values, list_rows
from capo_exp.figures.style import Look
from capo_exp.runs.read import LoggedRun, load_completions

OCCURRENCES, REJECTED, OF_ALL, OF_REJECTED = (
    "occurrences", "rejected occurrences", "share of all tokens", "share of rejected tokens",
)  # fmt: skip
TOP = 20
"""Tokens that are shown of a curve."""


def tokens(curve: Curve) -> Panel:
    """Returns the tokens of a curve that were rejected most often, by the share of their occurrences."""
    title, counts = f"Rejected by {curve.label}", [count_tokens(run) for run in curve.runs]
    total, rejected = (sum(parts, Counter[str]()) for parts in zip(*counts, strict=True))
    counted_seeds = sum(bool(own) for own, _ in counts)
    if not rejected:
        none = "no completions on disk with their keep flags (logger.completions_every)"
        lack = "no token of the logged completions was rejected" if total else none
        return Panel("tokens", title, _paint, lack=f"{title}: {lack}")
    most = sorted(rejected, key=lambda text: (-rejected[text], text))[:TOP]
    top = sorted(most, key=lambda text: -rejected[text] / total[text])
    counted = {
        "": [rejected[t] / total[t] for t in top],
        OCCURRENCES: [total[t] for t in top],
        REJECTED: [rejected[t] for t in top],
        OF_ALL: [total[t] / total.total() for t in top],
        OF_REJECTED: [rejected[t] / rejected.total() for t in top],
    }
    names, none, seeds = [visible(t) for t in top], np.full(len(top), NAN), np.full(len(top), counted_seeds)
    made = [
        (name, Series(curve, names, np.array(values, dtype=np.float64), none, none, seeds))
        for name, values in counted.items()
    ]
    series, further, height = (made[0][1],), tuple(made[1:]), 0.9 + 0.19 * len(top)
    return Panel("tokens", title, _paint, series, further=further, height=height)


def count_tokens(run: LoggedRun) -> tuple[Counter[str], Counter[str]]:
    """Counts the occurrences of each token, and those rejected, over all logged completions of a run."""
    total: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for row in load_completions(run):
        columns = [row.get(key) or () for key in ("tokens", "token_ids", "keep")]
        for text, number, keep in zip_longest(*columns):
            if keep is not None and (text, number) != (None, None):
                name = f"#{number}" if text is None else text
                total[name] += 1
                rejected[name] += not keep
    return total, rejected


def visible(text: str) -> str:
    r"""Returns a token as one can see it: `\n`, an open box for a space, ASCII for what fonts lack."""
    return ascii(text)[1:-1].replace(" ", "\N{OPEN BOX}")


def _paint(axes: Axes, panel: Panel, panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    """Draws the share of each token's occurrences, and the counts behind it."""
    series, counts = panel.series[0], dict(panel.further)
    places = list_rows(axes, list(series.x))
    axes.barh(places, series.centre, 0.72, color=looks[series.curve.label].colour, alpha=0.75)
    pairs = zip(counts[REJECTED].centre, counts[OCCURRENCES].centre, strict=True)
    for place, share, (gone, total) in zip(places, series.centre, pairs, strict=True):
        axes.annotate(
            f"{gone:.0f} of {total:.0f}", (share, place), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=style.OTHER,
        )  # fmt: skip
    axes.tick_params(axis="y", labelsize=8, labelfontfamily="monospace")
    right = 1.35 * float(series.centre.max())
    axes.set(xlabel="share of the token's occurrences", xlim=(0, right))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1])
    format_values(axes.xaxis, "percent")
