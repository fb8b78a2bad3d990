"""A set of runs and how to look at them; the numbers of curves, each computed once."""

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from capo_exp.config.errors import ConfigError
from capo_exp.figures import stats
from capo_exp.figures.bands import Band, Source
from capo_exp.figures.catalogue import PanelSpec
from capo_exp.figures.curves import Curve, reference_of, start_value
from capo_exp.figures.intervals import Interval, Statistic
from capo_exp.figures.stats import Estimate
from capo_exp.runs.read import Array, LoggedRun


@dataclass(frozen=True)
class Study:
    """What every figure is drawn from."""

    runs: tuple[LoggedRun, ...]
    curves: tuple[Curve, ...]
    """Of all runs."""
    statistic: Statistic
    interval: Interval
    smoothing: float | None
    """In place of the panels' own; None = theirs."""
    x: str | None
    """In place of the panels' own."""
    bands: dict[tuple[object, ...], Band | None] = field(default_factory=dict, repr=False, compare=False)
    """Those computed so far."""

    @property
    def reference(self) -> Curve | None:
        return reference_of(self.curves)


@dataclass(frozen=True)
class Series:
    """What is drawn of one curve, and a block of rows of the CSV."""

    curve: Curve
    x: Array | list[str]
    """[n]"""
    centre: Array
    """[n]"""
    low: Array
    """[n], NaN where there is no interval."""
    high: Array
    """[n]"""
    seeds: NDArray[Any]
    """[n], how many are behind each number."""

    @property
    def numbers(self) -> Array:
        """x where it is not names."""
        return np.asarray(self.x, dtype=np.float64)


class Lacking(ConfigError):
    """These runs do not have what a figure shows."""


class Unfit(Lacking):
    """A panel is not about these curves; of a split panel other curves may fit."""


class NoMetric(Lacking):
    """No run has logged the metric; the message is its name."""


def alpha(study: Study, spec: PanelSpec) -> float:
    """Weight of a new value in the moving average of a panel."""
    return spec.smoothing if study.smoothing is None else study.smoothing


def x_of(study: Study, spec: PanelSpec) -> str:
    """The metric on the x axis of a panel."""
    return study.x or spec.x


def start_of(study: Study, curve: Curve, spec: PanelSpec) -> float | None:
    """Value at x = 0, of runs at learning rate 0 with the curve's model and problems; None without any."""
    alike = [run for run in study.runs if _subject(run) == _subject(curve.runs[0])]
    return start_value(alike, spec.key, source=cast(Source, spec.source)) if spec.start else None


def _subject(run: LoggedRun) -> tuple[object, object]:
    return run.setting("model.name"), run.setting("dataset.name")


def band(study: Study, curve: Curve, spec: PanelSpec) -> Band | None:
    """The panel's metric of a curve, smoothed from its start point on; None if no run has it."""
    x, weight = x_of(study, spec), alpha(study, spec)
    key = (tuple(run.path for run in curve.runs), spec.key, spec.source, x, weight, spec.start)
    if key not in study.bands:
        start = start_of(study, curve, spec)
        runs = [from_start(run, spec, x, start) for run in curve.runs] if start is not None else curve.runs
        study.bands[key] = stats.band(
            runs, spec.key, source=cast(Source, spec.source), x=x, alpha=weight,
            statistic=study.statistic, interval=study.interval,
        )  # fmt: skip
    return study.bands[key]


def from_start(run: LoggedRun, spec: PanelSpec, x: str, start: float) -> LoggedRun:
    """The run with a row before its first, unless it has one at x = 0 already."""
    rows = run.evaluations if spec.source == "eval" else run.metrics
    points = [row[x] for row in rows if spec.key in row and x in row]
    if not points or 0 in points:
        return run
    rows = [{x: 0, spec.key: start}, *rows]
    return replace(run, evaluations=rows) if spec.source == "eval" else replace(run, metrics=rows)


def end(found: Band) -> int:
    """Index of the last x that at least half of the seeds have, as for stats.sample_efficiency."""
    return int(np.flatnonzero(2 * found.count >= found.count.max())[-1])


def series_of(curve: Curve, found: Band) -> Series:
    """The whole band."""
    return Series(curve, found.x, found.centre, found.low, found.high, found.count)


def estimate(study: Study, seeds: Array) -> Estimate:
    """One number from those of the seeds, [s]."""
    centre = stats.centre(seeds, study.statistic)
    low, high = stats.interval(seeds, study.statistic, study.interval)
    return Estimate(float(centre), float(low), float(high))
