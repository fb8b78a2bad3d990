"""Which tokens a selection rejects, counted in the completions that runs have logged."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from capo_exp.figures.catalogue import PanelSpec
from capo_exp.figures.curves import Curve
from capo_exp.figures.measure import NAN, Panel
from capo_exp.figures.study import Lacking, Series, Study
from capo_exp.runs.read import LoggedRun, load_completions

OCCURRENCES, REJECTED, OF_ALL, OF_REJECTED = (
    "occurrences", "rejected occurrences", "share of all tokens", "share of rejected tokens",
)  # fmt: skip


def tokens(spec: PanelSpec, title: str, study: Study, drawn: Sequence[Curve]) -> Panel:
    """The tokens of a curve that were rejected most often, with the share of their occurrences that was.

    Raises:
        Lacking: nothing logged, nothing rejected.
    """
    counts = [count(curve.runs) for curve in drawn]
    if not any(total for total, _ in counts):
        raise Lacking("no completions on disk with their keep flags (logger.completions_every)")
    made = [series(spec, curve, *both) for curve, both in zip(drawn, counts, strict=True) if both[1]]
    if not made:
        raise Lacking("no token of the logged completions was rejected")
    return Panel(
        spec=spec,
        title=title,
        series=tuple(parts[0][1] for parts in made),
        further=tuple(part for parts in made for part in parts[1:]),
        absent=tuple(curve.label for curve, (_, gone) in zip(drawn, counts, strict=True) if not gone),
    )


def count(runs: Sequence[LoggedRun]) -> tuple[Counter[str], Counter[str]]:
    """Occurrences of each token, and those rejected, over all logged completions of the runs."""
    total: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for run in runs:
        for row in load_completions(run):
            kept = row.get("keep")
            if kept is not None:
                texts = row.get("tokens") or [f"#{number}" for number in row["token_ids"]]
                total.update(texts)
                rejected.update(text for text, keep in zip(texts, kept, strict=True) if not keep)
    return total, rejected


def series(
    spec: PanelSpec, curve: Curve, total: Counter[str], rejected: Counter[str]
) -> list[tuple[str, Series]]:
    """What is drawn, and then the counts behind it; tokens in order of their rejections."""
    common = [text for text in rejected if total[text] >= spec.min_count]
    top = sorted(common, key=lambda text: (-rejected[text], text))[: spec.top]
    parts = {
        "": [rejected[t] / total[t] for t in top],
        OCCURRENCES: [total[t] for t in top],
        REJECTED: [rejected[t] for t in top],
        OF_ALL: [total[t] / total.total() for t in top],
        OF_REJECTED: [rejected[t] / rejected.total() for t in top],
    }
    none, seeds = np.full(len(top), NAN), np.full(len(top), len(curve.runs))
    names = [visible(text) for text in top]
    return [
        (name, Series(curve, names, np.array(values, dtype=np.float64), none, none, seeds))
        for name, values in parts.items()
    ]


def visible(text: str) -> str:
    r"""A token as one can see it: `\n`, an open box for a space, ASCII for what fonts lack."""
    return ascii(text)[1:-1].replace(" ", "\N{OPEN BOX}")
