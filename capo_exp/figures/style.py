"""The one look of every figure."""

from collections.abc import Iterator
from contextlib import contextmanager
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
SHIFT_COLOURS = {"policy": "#222222", "|objective|": "#B07A1E"}
"""The two predicted quantities, dark and light so that grey print keeps them apart."""

SETTINGS: dict[Any, Any] = {
    "figure.dpi": 100,
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
    "legend.handlelength": 2.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def colour(algorithm: str) -> str:
    """The algorithm's colour; grey if it has none."""
    return ALGORITHM_COLOURS.get(algorithm, OTHER)


@contextmanager
def house_style() -> Iterator[None]:
    """Applies the look to figures made inside; settings of the caller come back afterwards."""
    with mpl.rc_context(SETTINGS):
        yield
