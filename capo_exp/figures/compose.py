"""A figure's YAML and a study -> its panels with their numbers, or one line that says what the runs lack."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from capo_exp.figures import labels, measure, per_run, tokens
from capo_exp.figures.catalogue import Conditions, FigureSpec, PanelSpec, metric_keys
from capo_exp.figures.curves import Curve, curves
from capo_exp.figures.matching import describe, matching, present, unmet
from capo_exp.figures.measure import Panel
from capo_exp.figures.study import Lacking, NoMetric, Study, Unfit, x_of
from capo_exp.runs import metrics as names
from capo_exp.runs.read import LoggedRun

MEASURES = {
    "lines": measure.lines,
    "bars": measure.bars,
    "heat": per_run.heat,
    "stages": per_run.stages,
    "settings": per_run.settings,
    "tokens": tokens.tokens,
}


@dataclass(frozen=True)
class Picture:
    """All that a figure shows."""

    spec: FigureSpec
    panels: tuple[Panel, ...]
    curves: tuple[Curve, ...]
    lacking: tuple[str, ...]
    """What was left out and why."""


def compose(spec: FigureSpec, study: Study) -> Picture:
    """The panels that can be drawn.

    Raises:
        Lacking: none can; says why.
    """
    conditions = [one for panel in spec.panels for one in panel.curves or spec.curves]
    chosen = matching(study.runs, conditions)
    if not chosen:
        raise Lacking(needing(spec.panels[0].needs or conditions, study))
    if any(key.startswith("test/") for panel in spec.panels for key in metric_keys(panel)):
        _check_cards(chosen)
    drawn = curves(chosen, mix=True)  # the study has checked that they can be compared, or was told to mix
    made: dict[tuple[int, int], Panel] = {}
    problems: list[tuple[int, Lacking]] = []
    for place, panel in enumerate(spec.panels):
        for rank, (value, group) in enumerate(groups(panel, spec, drawn).items()):
            try:
                made[rank, place] = _panel(panel, value, study, group)
            except Lacking as error:
                problems.append((place, error))
    reasons = texts(problems, {place for _, place in made})
    if not made:
        raise Lacking("; ".join(reasons))
    panels = tuple(made[key] for key in sorted(made))
    shown = {one.curve.label for panel in panels for one in panel.series}
    absent = [f"{panel.title}: not in {', '.join(panel.absent)}" for panel in panels if panel.absent]
    return Picture(spec, panels, tuple(c for c in drawn if c.label in shown), (*reasons, *absent))


def _check_cards(runs: Sequence[LoggedRun]) -> None:
    """Checks that runs were tested by the same cards: benchmarks, prompts, sampling, grader.

    Raises:
        Lacking: they were not.
    """
    cards = Counter(", ".join(row["cards"]) for run in runs for row in run.evaluations[-1:] if "cards" in row)
    if len(cards) > 1:
        seen = "; ".join(f"{card} ({count} run{'s' * (count > 1)})" for card, count in cards.items())
        raise Lacking(
            f"runs tested by different cards: {seen}; expected the same: evaluate them by one command"
        )


def texts(problems: Sequence[tuple[int, Lacking]], made: Collection[int]) -> list[str]:
    """What was not drawn and why, each reason once; of a split panel it is enough that some curves fit."""
    unlogged = dict.fromkeys(str(error) for _, error in problems if isinstance(error, NoMetric))
    others = [
        str(error)
        for place, error in problems
        if not isinstance(error, NoMetric) and not (isinstance(error, Unfit) and place in made)
    ]
    metrics = [f"no run has logged {', '.join(unlogged)}"] if unlogged else []
    return [*dict.fromkeys(others), *metrics]


def _panel(spec: PanelSpec, value: str, study: Study, group: Sequence[Curve]) -> Panel:
    runs = [run for curve in group for run in curve.runs]
    if spec.needs and not matching(runs, spec.needs):
        raise Unfit(needing(spec.needs, study))
    panel = MEASURES[spec.draw](spec, spec.title.format(value=value), study, group)
    if not panel.series:
        x = x_of(study, spec)
        raise NoMetric(spec.key if x == names.COMPLETIONS else f"{spec.key} with {x}")
    return panel


def needing(conditions: Conditions, study: Study) -> str:
    """What no run has, and what they have in its place."""
    told = [missing for wanted in conditions if (missing := unmet(study.runs, wanted))]
    return f"needs runs with {describe(told)}; these have {present(study.runs, told)}"


def groups(panel: PanelSpec, figure: FigureSpec, drawn: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The curves of a panel, or of each of those that it is split into: value -> curves."""
    mine = [c for c in drawn if matching(c.runs[:1], panel.curves or figure.curves)]
    if not panel.split:
        return {"": mine}
    values = {curve.label: value_of(curve, panel.split) for curve in mine}
    found = list(dict.fromkeys(values.values()))
    if all(isinstance(value, int | float) for value in found):
        found.sort()
    return {str(value): [c for c in mine if values[c.label] == value] for value in found}


def value_of(curve: Curve, key: str) -> Any:
    """What a panel is split by: a config value; for people if it is the algorithm, the method, the curve."""
    run = curve.runs[0]
    algorithm = labels.ALGORITHMS.get(curve.algorithm, curve.algorithm or curve.label)
    on_top = [run.setting("algo.variant", ""), run.setting("algo.step_rule_name", "")]
    method = " ".join(filter(None, [algorithm, *(str(name).replace("_", " ") for name in on_top)]))
    named = {"algo.name": algorithm, "method": method, "curve": curve.label}
    return named[key] if key in named else run.setting(key)
