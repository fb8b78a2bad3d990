"""A metric of the runs of one curve: x, centre, interval, and every seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capo_exp.core.intervals import Interval, Statistic, centre_of_seeds, ema
from capo_exp.core.intervals import interval as bounds
from capo_exp.runs import metrics as names
from capo_exp.runs.read import Array, LoggedRow, LoggedRun, read_series

FEW_POINTS = 10
"""A seed with fewer points is not smoothed: the average would hardly leave its first."""


@dataclass(frozen=True)
class Band:
    """A metric over x [n], which increases, with its seeds."""

    x: Array
    centre: Array
    low: Array  # NaN where fewer than two seeds have a value, and so is high
    high: Array
    values: Array  # [s, n] of each seed, smoothed; NaN where it has none
    statistic: Statistic  # What the centre is
    alpha: float  # Smoothing of the values
    ends: Array  # [s], x at which each ended; one that was stopped may have values beyond (`ended`)
    cut: NDArray[np.bool_]  # [s], whether it ended before its plan
    unsmoothed: int  # Seeds with FEW_POINTS, of a band that is smoothed

    @property
    def seeds(self) -> int:
        """Returns s, the runs that have the metric at all."""
        return len(self.values)

    @property
    def count(self) -> NDArray[np.int64]:
        """Returns [n], the seeds that have a value."""
        return np.isfinite(self.values).sum(axis=0)

    @property
    def losses(self) -> list[tuple[float, int]]:
        """Returns where seeds end before the others or their plan: x, and how many go on from there."""
        early = np.unique(self.ends[self.cut | (self.ends < self.x[-1])])
        return [(float(x), int((self.ends > x).sum())) for x in early]

    @property
    def stopped(self) -> bool:
        """Returns whether seeds that ended have values beyond: those of runs without reward (to_its_end)."""
        return bool(np.isfinite(self.values[self.x > self.ends[:, None]]).any())

    @property
    def end(self) -> int:
        """Returns the index of the last x that more than half of the seeds have reached."""
        return int(np.flatnonzero(2 * self.count > self.count.max())[-1])


def in_evaluations(key: str) -> bool:
    """Returns whether a metric is one of evaluations, not of training steps."""
    return key.startswith(("eval/", "test/"))


def band(
    runs: Sequence[LoggedRun], key: str, *, x: str, statistic: Statistic, interval: Interval, alpha: float
) -> Band | None:
    """Returns a metric over x, or None if no run has it: each seed smoothed, then centre and interval.

    A seed with fewer than FEW_POINTS is not smoothed. Several values at one x (a run that logs every
    optimiser step of a rollout step) count as their mean. Values that were not finite are left out. Runs may
    have different lengths: the x of the band are those at which more than half of the seeds that reach so
    far have a value, and each uses the seeds that have one. Where this would lose more than half of all x
    (completions that differ between seeds, because groups were filtered), seeds are interpolated, linearly
    between two of their own points, onto as many of all x as the longest has.

    `x` is the metric along the axis; statistic, interval and alpha (1 = off) are as in core.intervals.
    """
    every = [(run, *_points(run, key, x)) for run in runs]
    found = [(run, at, value) for run, at, value in every if len(at)]
    if not found:
        return None
    weights = [alpha if len(at) >= FEW_POINTS else 1.0 for _, at, _ in found]
    smooth = [(at, ema(value, weight)) for weight, (_, at, value) in zip(weights, found, strict=True)]
    grid, values = _aligned(smooth)
    low, high = bounds(values, statistic, interval)
    stops = [ended(run, x) for run, *_ in found]
    ends = np.array([min(at[-1], stop) for (_, at, _), (stop, _) in zip(found, stops, strict=True)])
    return Band(
        grid, centre_of_seeds(values, statistic), low, high, values, statistic, alpha,
        ends, np.array([cut for _, cut in stops]), sum(weight != alpha for weight in weights),
    )  # fmt: skip


def taken(run: LoggedRun) -> list[LoggedRow]:
    """Returns the rows of a run without those that runs.read.to_its_end has added."""
    return [row for row in run.metrics if names.UNREWARDED_STEPS in row] or run.metrics


def ended(run: LoggedRun, x: str) -> tuple[float, bool]:
    """Returns the x of a run's last step, infinite if it did not log that, and whether more were planned."""
    last = (taken(run) or [{}])[-1]
    stop, done = last.get(x), last.get(names.STEP)
    planned = run.setting("num_steps")
    cut = isinstance(planned, int) and done is not None and done < planned
    return np.inf if stop is None else float(stop), cut


def _points(run: LoggedRun, key: str, x: str) -> tuple[Array, Array]:
    """Returns x and values of one run, [n] each; x increasing, every value finite.

    All updates of a rollout step have its reward, which is read once, at the last: it is one measurement.
    """
    logged = (run.steps if key.startswith("reward/") else []) or run.metrics
    rows = run.evaluations if in_evaluations(key) else logged
    at, value = read_series(rows, key, x=x)
    finite = np.isfinite(at) & np.isfinite(value)
    grid, place, count = np.unique(at[finite], return_inverse=True, return_counts=True)
    return grid, np.bincount(place, value[finite], len(grid)) / np.maximum(count, 1)


def _aligned(points: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Returns the common x [n] and the values of each seed there [s, n]; see `band` for the rule."""
    union = np.unique(np.concatenate([at for at, _ in points]))
    values = np.full((len(points), len(union)), np.nan)
    for row, (at, value) in zip(values, points, strict=True):
        row[np.searchsorted(union, at)] = value
    reach = sum((union >= at[0]) & (union <= at[-1]) for at, _ in points)
    common = 2 * np.isfinite(values).sum(axis=0) > reach
    if 2 * common.sum() >= len(union):
        return union[common], values[:, common]
    longest = max(len(at) for at, _ in points)
    grid = union[np.linspace(0, len(union) - 1, longest).round().astype(int)]
    return grid, np.stack([np.interp(grid, at, value, left=np.nan, right=np.nan) for at, value in points])
