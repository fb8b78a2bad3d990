"""The one look of every figure."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

ALGORITHM_COLOURS = {
    # the subject of the study
    "capo": "#0072B2",
    "dr_capo": "#56B4E9",
    "rein_capo": "#6A5ACD",
    # what it is compared with
    "grpo": "#D55E00",
    "dr_grpo": "#E69F00",
    "reinforce": "#CC79A7",
    "rloo": "#009E73",
    "reinforce_pp": "#882255",
    "cpgd": "#332288",
    "dapo": "#999933",
    "gspo": "#44AA99",
    "cispo": "#AA4499",
    "dash": "#117733",
}
"""Colour-blind safe (Okabe and Ito 2008; Tol's muted set). Every figure gives an algorithm this colour."""
OTHER = "#555555"
"""An algorithm without a colour of its own."""
MARKERS = dict(zip([*ALGORITHM_COLOURS, ""], "oD^sPvXh*<>pd.", strict=True))
"""A second sign of the algorithm, for grey print; "" = one without a colour of its own."""
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.4)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 3)),
    (0, (4, 1.2, 1.2, 1.2, 1.2, 1.2)),
)
"""Tells curves of one colour apart; the second is for the conservative regime."""
REFERENCE = "#333333"
"""Lines at a reference's value."""
STAGES = (
    "#0B2A4A", "#FFFFFF", "#2F6690", "#F2E2B8", "#7A5C1E", "#C9DDEE", "#D55E00", "#9DB4A6", "#5B7F6B",
    "#E6E6E6",
)  # fmt: skip
"""Parts of a bar, in order; neighbours differ in lightness."""
HEAT = "cividis"
SHIFT_COLOURS = {"policy": "#222222", "|objective|": "#B07A1E"}
"""The two predicted quantities, dark and light so that grey print keeps them apart."""

SETTINGS: dict[Any, Any] = {
    "pdf.fonttype": 42,  # text stays text
    "figure.dpi": 160,  # as saved: text is laid out in whole pixels
    "savefig.dpi": 160,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#777777",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.4,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Look:
    """Of one curve: colour and marker say the algorithm, dashes and filling the regime or variant."""

    colour: str
    dashes: Any
    marker: str
    filled: bool

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of Axes.plot."""
        face = self.colour if self.filled else "white"
        return {
            "color": self.colour, "linestyle": self.dashes, "marker": self.marker, "markersize": 4.2,
            "markerfacecolor": face, "markeredgewidth": 1.0,
        }  # fmt: skip


def family(algorithm: str) -> str:
    """The algorithm with a colour that this is or, by its name, a variant of: grpo_kl -> grpo; else ""."""
    parts = algorithm.split("_")
    starts = ("_".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((start for start in starts if start in ALGORITHM_COLOURS), "")


def colour(algorithm: str) -> str:
    """The colour of the algorithm, or of the one that it is a variant of; grey if it has none."""
    return ALGORITHM_COLOURS.get(family(algorithm), OTHER)


def looks(curves: Iterable[tuple[str, str, str]]) -> dict[str, Look]:
    """How to draw the curves of one figure so that no two look the same.

    Args:
        curves: label, algorithm and regime of each.
    """
    seen: Counter[tuple[str, bool]] = Counter()
    result = {}
    for label, algorithm, regime in curves:
        kind = (family(algorithm), regime == "conservative")
        result[label] = _look(kind[0], kind[1], seen[kind])
        seen[kind] += 1
    return result


def _look(name: str, conservative: bool, place: int) -> Look:
    styles = [DASHES[i] for i in ((1, 4) if conservative else (0, 2, 3, 5))]
    turn, style = divmod(place, len(styles))
    marks = list(MARKERS.values())
    marker = marks[(marks.index(MARKERS[name]) + turn // 2) % len(marks)]
    return Look(colour(name), styles[style], marker, filled=((place + turn) % 2 == 0) != conservative)


@contextmanager
def house_style() -> Iterator[None]:
    """Applies the look to figures made inside; settings of the caller come back afterwards."""
    with mpl.rc_context(SETTINGS):
        yield
