"""A set of runs and how to look at them; the numbers of curves, each computed once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from capo_exp.config.errors import ConfigError
from capo_exp.core.intervals import Estimate, Interval, Statistic, seed_estimate
from capo_exp.figures import bands, labels
from capo_exp.figures.bands import Band, in_evaluations
from capo_exp.figures.curves import Curve, curves, reference_of, start_value, without_copies
from capo_exp.runs import metrics as names
from capo_exp.runs.read import Array, LoggedRun

X_LABELS = {
    "counter/completions": "training completions", "counter/optimizer_step": "optimiser steps",
    "counter/rollout_step": "rollout steps", "counter/generated_tokens": "generated tokens",
    "counter/prompts": "training prompts",
}  # fmt: skip
"""Metrics that can be the x axis -> what stands there."""
MAX_VALUES = 4
"""Values of a key that a message shows."""


class Lacking(ConfigError):
    """These runs do not have what a figure shows."""


@dataclass(frozen=True)
class Metric:
    """A metric, and how a figure reads and shows it."""

    key: str
    label: str
    unit: str = "number"
    """number | percent | points | seconds | completions, which are what x counts"""
    smoothing: float = 1.0  # Weight of a new value in the exponential moving average; 1 = none
    start: bool = False
    """Whether curves begin at x = 0 with the value of runs at learning rate 0, if there are any."""
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    """Ends of the axis of values; None = from the data."""
    x: str = names.COMPLETIONS


@dataclass(frozen=True)
class Study:
    """What every figure is drawn from."""

    runs: tuple[LoggedRun, ...]
    curves: tuple[Curve, ...]  # Those of all runs
    statistic: Statistic
    interval: Interval
    smoothing: float | None  # In place of the figures' own; None = theirs
    x: str | None  # In place of the figures' own
    bands: dict[tuple[object, ...], Band | None] = field(default_factory=dict, repr=False, compare=False)
    """Those computed so far."""
    starts: dict[tuple[str, str], float | None] = field(default_factory=dict, repr=False, compare=False)
    """Where curves begin, likewise."""

    @property
    def reference(self) -> Curve | None:
        """Returns the curve that methods are compared with."""
        return reference_of(self.curves)

    def is_reference(self, curve: Curve) -> bool:
        """Returns whether a curve of a figure has the runs of the reference."""
        return self.reference is not None and curve.run.path in [run.path for run in self.reference.runs]

    def choose(self, fits: Callable[[LoggedRun], bool], wanted: Mapping[str, str]) -> list[Curve]:
        """Returns the curves of the runs that fit, with labels that tell just these apart.

        Raises:
            Lacking: there are none; `wanted` says by key what would have been needed.
        """
        chosen = [run for run in self.runs if fits(run)]
        if not chosen:
            raise Lacking(self.explain_lack(wanted))
        return curves(chosen, mix=True)  # whether they can be compared, the command has checked

    def explain_lack(self, wanted: Mapping[str, str]) -> str:
        """Says what no run has, and what they have in its place."""
        have = []
        for key in wanted:
            values = list(dict.fromkeys(_shown(run, key) for run in self.runs))
            more = ["..."] if len(values) > MAX_VALUES else []
            have.append(f"{key} = {'|'.join([*values[:MAX_VALUES], *more])}")
        asked = " and ".join(f"{key} {value}" for key, value in wanted.items())
        return f"needs runs with {asked}; these have {', '.join(have)}"

    def settled(self, metric: Metric) -> Metric:
        """Returns the metric with what the command line has in place of the figure's own."""
        smoothing = metric.smoothing if self.smoothing is None else self.smoothing
        x = self.x or metric.x
        label = X_LABELS.get(x, x) if metric.unit == "completions" else metric.label
        return replace(metric, smoothing=smoothing, x=x, label=label)

    def start_of(self, curve: Curve, metric: Metric) -> float | None:
        """Returns the value at x = 0, of runs at learning rate 0 with the same model and problems, if any."""
        key = (str(subject(curve.run)), metric.key)
        if metric.start and key not in self.starts:
            alike = [run for run in self.runs if subject(run) == subject(curve.run)]
            self.starts[key] = start_value(without_copies(alike), metric.key)
        return self.starts[key] if metric.start else None

    def band(self, curve: Curve, metric: Metric) -> Band | None:
        """Returns a settled metric of a curve, smoothed from its start point on; None if no run has it."""
        key = (tuple(run.path for run in curve.runs), metric.key, metric.x, metric.smoothing, metric.start)
        if key not in self.bands:
            start = self.start_of(curve, metric)
            runs = curve.runs if start is None else [_from_start(run, metric, start) for run in curve.runs]
            self.bands[key] = bands.band(
                runs, metric.key, x=metric.x, alpha=metric.smoothing,
                statistic=self.statistic, interval=self.interval,
            )  # fmt: skip
        return self.bands[key]

    def bands_of(self, drawn: Sequence[Curve], metric: Metric) -> dict[str, Band]:
        """Returns the bands of the curves that have the metric, by label."""
        found = {curve.label: self.band(curve, metric) for curve in drawn}
        return {label: band for label, band in found.items() if band is not None and band.count.any()}

    def over_seeds(self, values: Array) -> Estimate:
        """Returns one number from those of the seeds, [s]."""
        return seed_estimate(values, self.statistic, self.interval)


def _shown(run: LoggedRun, key: str) -> str:
    return labels.method(run) or "none" if key == "method" else str(run.setting(key, "none"))


def subject(run: LoggedRun) -> tuple[object, object]:
    """Returns the model and the problems: curves of others are not measured against each other."""
    return run.setting("model.name"), run.setting("dataset.name")


def _from_start(run: LoggedRun, metric: Metric, start: float) -> LoggedRun:
    """Returns the run with a row before its first, unless it has one at x = 0 already."""
    evaluated = in_evaluations(metric.key)
    rows = run.evaluations if evaluated else run.metrics
    points = [row[metric.x] for row in rows if metric.key in row and metric.x in row]
    if not points or 0 in points:
        return run
    rows = [{names.STEP: 0, metric.x: 0, metric.key: start}, *rows]
    return replace(run, evaluations=rows) if evaluated else replace(run, metrics=rows)
