"""Arrays in, numbers out: how much sooner a method gets somewhere, and how well it stays there.

No files, no drawing. What is in bands.py and intervals.py can be imported from here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from capo_exp.figures.bands import Band, Source, band
from capo_exp.figures.intervals import LEVEL, RESAMPLES, Estimate, Interval, Statistic, centre, ema, interval
from capo_exp.runs.read import Array

__all__ = [
    "Band", "Estimate", "Factor", "Interval", "Source", "Stability", "Statistic", "band", "centre", "ema",
    "interval", "sample_efficiency", "stability",
]  # fmt: skip

NOISE_DROP = 8.0
"""Standard deviations of its smoothed curve that a seed loses more than, if it collapsed; see `stability`."""
FEW = 20
"""Values below which a curve's noise cannot be told from its shape."""
KEPT = 0.9
"""Share of its peak's accuracy that a seed ends with, or more, if it has kept it."""


@dataclass(frozen=True)
class Factor:
    """How many times fewer completions a method needs than the reference, for the same accuracy."""

    target: float
    """That accuracy; NaN if the reference sets none, and then the rest is NaN or None."""
    reference_x: float
    method_x: float | None
    """None if the method never reaches the target."""
    factor: float | None
    """reference_x / method_x; 30 = the reference needs 30 times as many."""
    low: float
    """95 % interval; 0 if more than 2.5 % of the resamples do not reach the target. NaN below two seeds of
    either."""
    high: float
    reached_share: float
    """Share of the resamples in which the method reaches the target; 0 or 1 below two seeds."""
    undefined_share: float
    """Share of the resamples in which the reference sets no target; the others make the interval."""


@dataclass(frozen=True)
class Stability:
    """Of one curve, over its seeds."""

    seeds: int
    collapsed_share: Estimate
    """Interval: Wilson's for a share."""
    kept_share: Estimate
    """Of seeds that end with KEPT of their peak; likewise."""
    collapses: tuple[float | None, ...]
    """x of each seed's collapse; None if it did not."""
    first_collapse: float | None
    """Median of those that collapsed; None if none did."""
    final: Estimate
    """Of each seed's own last x, so of a seed that broke off too."""
    worst_after_peak: Estimate
    """Lowest point from the seed's highest on."""
    peak: Estimate
    auc: Estimate
    """Mean height of the curve: area under it over the length of x."""


def sample_efficiency(
    reference: Band, method: Band, *, level: float | None = None, start: float | None = None
) -> Factor:
    """Completions that the reference needs over those that the method needs for the same accuracy.

    The target is the accuracy of the reference at its end (Band.end), of its seeds that get there. Both
    curves are read in the same way: the first x > 0 at which the smoothed centre is at or above the target,
    among the points that were logged, so an x is exact to one step of its curve. A target that is not above
    the accuracy before training is none: any curve has it after its first step, and the factor would be that
    of the steps' sizes.

    The interval is the percentile bootstrap: seeds of both are drawn anew, each draw with a target of its
    own. A draw in which the method does not reach its target has factor 0. With few seeds it is too narrow,
    as that of a mean (intervals.py).

    Args:
        reference: With the same smoothing and statistic as the method.
        method: Likewise.
        level: Target in place of the reference's end.
        start: Accuracy before training; None = the reference's first point.
    """
    at_end = np.isfinite(reference.values[:, reference.end])
    values = reference.values[at_end, : reference.end + 1]
    ask = partial(_crossings, reference.x[: reference.end + 1], method.x, level=level, start=start)
    target, before, after = ask(centre(values, reference.statistic)[None], method.centre[None])
    reached = bool(np.isfinite(after[0]))
    low, high, share, undefined = np.nan, np.nan, float(reached), float(np.isnan(target[0]))
    if min(len(values), method.seeds) >= 2:
        draws = [_resampled(values, reference.statistic, 0), _resampled(method.values, method.statistic, 1)]
        low, high, share, undefined = _spread(*ask(*draws))
    if np.isnan(target[0]):
        return Factor(np.nan, np.nan, None, None, np.nan, np.nan, np.nan, undefined)
    return Factor(
        target=float(target[0]),
        reference_x=float(before[0]),
        method_x=float(after[0]) if reached else None,
        factor=float(before[0] / after[0]) if reached else None,
        low=low,
        high=high,
        reached_share=share,
        undefined_share=undefined,
    )


def _crossings(
    x: Array, method_x: Array, reference: Array, method: Array, *, level: float | None, start: float | None
) -> tuple[Array, Array, Array]:
    """Target, and the first x of the reference [r, n] and of the method [r, m] at it, [r] each: NaN where the
    reference sets no target, infinite where the method does not reach it."""
    first, last = _ends(reference)
    target = last if level is None else np.full(len(last), level)
    before = _first_x(x, reference, target)
    sets = (target > (first if start is None else start)) & np.isfinite(before)
    after = _first_x(method_x, method, target)
    return np.where(sets, target, np.nan), np.where(sets, before, np.nan), np.where(sets, after, np.nan)


def _ends(curves: Array) -> tuple[Array, Array]:
    """First and last value of each curve, [r, n] -> two of [r]; NaN of a curve without any."""
    there = np.isfinite(curves)
    row = np.arange(len(curves))
    return curves[row, there.argmax(1)], curves[row, -1 - there[:, ::-1].argmax(1)]


def _first_x(x: Array, curves: Array, target: Array) -> Array:
    hit = (curves >= target[:, None]) & (x > 0)
    return np.where(hit.any(axis=1), x[hit.argmax(axis=1)], np.inf)


def _resampled(values: Array, statistic: Statistic, stream: int) -> Array:
    """Centres of resampled seeds, [s, n] -> [r, n]."""
    seeds = len(values)
    draws = np.random.default_rng(stream).integers(0, seeds, (RESAMPLES, seeds))
    return np.concatenate([centre(values[part], statistic, axis=1) for part in np.array_split(draws, 20)])


def _spread(target: Array, before: Array, after: Array) -> tuple[float, float, float, float]:
    """Bounds of the factor, share that reaches the target, share without one."""
    defined = np.isfinite(target)
    if not defined.any():
        return np.nan, np.nan, np.nan, 1.0
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    low, high = np.quantile(before[defined] / after[defined], tails, method="inverted_cdf")
    return float(low), float(high), float(np.isfinite(after[defined]).mean()), float(1 - defined.mean())


def stability(band: Band, *, start: float, kind: Interval = "t") -> Stability:
    """How well a curve keeps what it has learned.

    A seed has collapsed if its smoothed accuracy, after its peak, has lost at least half of what it had
    gained by then, peak - start, and more than noise takes: NOISE_DROP standard deviations of its smoothed
    curve, where it has FEW values or more. The collapse is the first such x. The peak is never below `start`,
    so a run that breaks at once has collapsed; a run that later rises above its old peak has a new one, and
    has not.

    Without the bound on noise nearly every run that learns nothing "collapses". With it at most 1 % of such
    seeds do, if the curve begins with its accuracy before training (up to 20 % if it begins with the noise of
    one step); of runs that gain 0.15 and lose all of it again, 99 % are found (simulated: 100 steps of 96
    completions, smoothing 0.1).

    Args:
        band: Accuracy.
        start: Accuracy before training.
        kind: Of the intervals over seeds of final, worst_after_peak, peak and auc.
    """
    seeds = [(np.isfinite(y), y) for y in band.values]
    fates = [_fate(band.x[there], y[there], start, band.alpha) for there, y in seeds if there.any()]
    collapses = [fate.collapse for fate in fates]
    when = [x for x in collapses if x is not None]
    kept = [fate.final >= KEPT * fate.peak for fate in fates]
    over = partial(_estimate, statistic=band.statistic, kind=kind)
    return Stability(
        seeds=len(fates),
        collapsed_share=_share(len(when), len(fates)),
        kept_share=_share(sum(kept), len(fates)),
        collapses=tuple(collapses),
        first_collapse=float(np.median(when)) if when else None,
        final=over([fate.final for fate in fates]),
        worst_after_peak=over([fate.worst for fate in fates]),
        peak=over([fate.peak for fate in fates]),
        auc=over([fate.auc for fate in fates]),
    )


@dataclass(frozen=True)
class _Fate:
    final: float
    worst: float
    peak: float
    auc: float
    collapse: float | None


def _fate(x: Array, y: Array, start: float, alpha: float) -> _Fate:
    """Of one seed, [n] each."""
    top = int(y.argmax())
    height = max(float(y[top]), start)
    after = slice(0 if height > y[top] else top, None)
    loss = height - y[after]
    fallen = (loss >= (height - start) / 2) & (loss > NOISE_DROP * noise(y, alpha))
    return _Fate(
        final=float(y[-1]),
        worst=float(y[after].min()),
        peak=float(y[top]),
        auc=_area(x, y),
        collapse=float(x[after][fallen.argmax()]) if fallen.any() else None,
    )


def areas(band: Band) -> Array:
    """Mean height of each seed's curve, [s]: the area under it over its length."""
    there = np.isfinite(band.values)
    return np.array([_area(band.x[own], y[own]) for own, y in zip(there, band.values, strict=True)])


def _area(x: Array, y: Array) -> float:
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def _share(count: int, seeds: int) -> Estimate:
    wilson = stats.binomtest(count, seeds).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / seeds, float(wilson.low), float(wilson.high))


def _estimate(of_seeds: Sequence[float], statistic: Statistic, kind: Interval) -> Estimate:
    values = np.array(of_seeds)
    low, high = interval(values, statistic, kind)
    return Estimate(float(centre(values, statistic)), float(low), float(high))


def noise(smooth: Array, alpha: float) -> float:
    """Standard deviation of a moving average [n] from step to step noise; 0 below FEW values.

    From the median difference of neighbours before smoothing, so that neither a trend nor a jump counts as
    noise.
    """
    raw = smooth[1:] - (1 - alpha) * smooth[:-1]  # times alpha
    if len(smooth) < FEW:
        return 0.0
    spread = np.median(np.abs(np.diff(raw))) / stats.norm.ppf(0.75) / np.sqrt(2)
    return float(spread / alpha * np.sqrt(alpha / (2 - alpha)))
