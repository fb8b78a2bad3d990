"""A metric of the runs of one curve: x, centre, interval, and every seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capo_exp.core.intervals import Interval, Statistic, centre_of_seeds, ema
from capo_exp.core.intervals import interval as bounds
from capo_exp.runs.read import Array, LoggedRow, LoggedRun, read_series


@dataclass(frozen=True)
class Band:
    """A metric over x [n], which increases, with its seeds."""

    x: Array
    centre: Array
    low: Array
    """NaN where fewer than two seeds have a value, and so is high."""
    high: Array
    values: Array
    """[s, n] of each seed, smoothed; NaN where it has none."""
    seeds: int
    """s, the runs that have the metric at all."""
    statistic: Statistic = "mean"
    """What the centre is."""
    alpha: float = 1.0
    """Smoothing of the values."""

    @property
    def count(self) -> NDArray[np.int64]:
        """Returns [n], the seeds that have a value."""
        return np.isfinite(self.values).sum(axis=0)

    @property
    def last_shown(self) -> int:
        """Returns the index of the last x that at least half of the seeds have; tables read it."""
        return int(np.flatnonzero(2 * self.count >= self.count.max())[-1])

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

    Several values at one x (a run that logs every optimiser step of a rollout step) count as their mean.
    Values that were not finite are left out. Runs may have different lengths: the x of the band are those at
    which more than half of the seeds that reach so far have a value, and each uses the seeds that have one.
    Where this would lose more than half of all x (completions that differ between seeds, because groups were
    filtered), seeds are interpolated, linearly between two of their own points, onto as many of all x as the
    longest has.

    `x` is the metric along the axis; statistic, interval and alpha (1 = off) are as in core.intervals.
    """
    points = [_points(run.evaluations if in_evaluations(key) else run.metrics, key, x, alpha) for run in runs]
    points = [(at, value) for at, value in points if len(at)]
    if not points:
        return None
    grid, values = _aligned(points)
    low, high = bounds(values, statistic, interval)
    return Band(grid, centre_of_seeds(values, statistic), low, high, values, len(points), statistic, alpha)


def _points(rows: Sequence[LoggedRow], key: str, x: str, alpha: float) -> tuple[Array, Array]:
    """Returns x and smoothed values of one run, [n] each; x increasing, every value finite."""
    at, value = read_series(rows, key, x=x)
    finite = np.isfinite(at) & np.isfinite(value)
    grid, place, count = np.unique(at[finite], return_inverse=True, return_counts=True)
    return grid, ema(np.bincount(place, value[finite], len(grid)) / np.maximum(count, 1), alpha)


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
