"""The one look of every figure."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from matplotlib import rc_params_from_file
from matplotlib.colors import is_color_like, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from capo_exp.figures.curves import Curve
from capo_exp.figures.labels import is_safe, logged
from capo_exp.runs.read import LoggedRun

SPARE = ("#AA4499", "#661100", "#6699CC", "#8C6D31", "#3F5F3F", "#7F3C8D", "#A6761D", "#4B4B8F")
"""Colours of methods that state none, by their name; none of them is one of conf/algo."""
OTHER = "#555555"
"""What belongs to no method."""
MARKERS = "oD^sPvXh*<>pd."
"""Markers tell curves of one colour apart; a method that states none has one by its name."""
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)), (0, (4, *[1.2] * 5)),
)  # fmt: skip
"""Dashes tell curves of one colour apart; the second is for the conservative regime."""
DARK, LIGHT = (("k", 0.45), ("k", 0.65), ("w", 0.25)), (("k", 0.0), ("w", 0.4), ("k", 0.25), ("w", 0.6))
"""Shades of one colour: what it is mixed with, and how much of that."""
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

SETTINGS = rc_params_from_file(Path(__file__).with_name("house.mplstyle"), use_default_template=False)


@dataclass(frozen=True)
class Look:
    """The look of one curve: colour and marker say the method, dashes and filling the regime or variant."""

    colour: str
    dashes: Any
    marker: str
    filled: bool

    @property
    def line(self) -> dict[str, Any]:
        """Returns arguments of Axes.plot."""
        face = self.colour if self.filled else "white"
        return {
            "color": self.colour, "linestyle": self.dashes, "marker": self.marker, "markersize": 4.2,
            "markerfacecolor": face, "markeredgewidth": 1.0,
        }  # fmt: skip


def colour(run: LoggedRun) -> str:
    """Returns the colour that every figure gives a run's method: its own, else one by its name."""
    own = logged(run, "colour")
    return to_hex(own) if is_color_like(own) else _by_name(run, SPARE, OTHER)


def marker(run: LoggedRun) -> str:
    """Returns a second sign of the method, for grey print."""
    own = logged(run, "marker")
    return own if own.strip() and own in MarkerStyle.markers else _by_name(run, MARKERS, MARKERS[-1])


def _by_name(run: LoggedRun, signs: Sequence[str], nameless: str) -> str:
    name = str(run.setting("algo.name", ""))
    return signs[crc32(name.encode()) % len(signs)] if name else nameless


def looks(curves: Sequence[Curve]) -> dict[str, Look]:
    """Returns how to draw the curves of one figure, by label, so that no two look the same.

    Curves of one colour have shades of it: the conservative regime dark ones, others the colour itself first.
    """
    seen: Counter[tuple[str, bool]] = Counter()
    result = {}
    for curve in curves:
        hue = colour(curve.run), is_safe(curve.run)
        result[curve.label] = _look(shade(*hue, seen[hue]), marker(curve.run), hue[1], seen[hue])
        seen[hue] += 1
    return result


def shade(colour: str, conservative: bool, place: int) -> str:
    """Returns the place-th shade of a colour, mixed with black or white."""
    mixed = DARK if conservative else LIGHT
    towards, share = mixed[place % len(mixed)]
    turn = place // len(mixed)
    share = (share + 0.07 * turn) % 0.8
    red, green, blue = (1 - share) * np.array(to_rgb(colour)) + share * np.array(to_rgb(towards))
    return to_hex((red, green, blue))


def _look(colour: str, first: str, conservative: bool, place: int) -> Look:
    styles = [DASHES[i] for i in ((1, 4) if conservative else (0, 2, 3, 5))]
    turn, dashes = divmod(place, len(styles))
    start = MARKERS.find(first)
    marker = MARKERS[(start + turn // 2) % len(MARKERS)] if start >= 0 or turn > 1 else first
    return Look(colour, styles[dashes], marker, filled=((place + turn) % 2 == 0) != conservative)


def as_bytes(figure: Figure, kind: str, metadata: Mapping[str, Any]) -> bytes:
    """Returns a figure as pdf, or as png of 256 colours, which is a third as large."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, metadata=dict(metadata) if kind == "pdf" else None)
    if kind == "pdf":
        return out.getvalue()
    small = Image.open(out).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    texts, png = PngInfo(), io.BytesIO()
    for key, text in metadata.items():
        texts.add_text(key, text)
    small.save(png, "png", pnginfo=texts, optimize=True, dpi=(figure.dpi, figure.dpi))
    return png.getvalue()
