"""Arrays in, numbers out: how much sooner a method gets somewhere, and how well it stays there."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from capo_exp.core.intervals import LEVEL, RESAMPLES, Estimate, Statistic, centre_of_seeds
from capo_exp.figures.bands import Band
from capo_exp.runs.read import Array

NOISE_DROP = 8.0
"""Standard deviations of its smoothed curve that a seed loses more than, if it collapsed; see `collapse`."""
FEW = 20
"""Values below which a curve's noise cannot be told from its shape."""
Points = tuple[Array, Array]
"""x, which increases, and a curve's values there, [n] each."""
KEPT = 0.9
"""Share of its peak's accuracy that a seed ends with, or more, if it has kept it."""


@dataclass(frozen=True)
class Factor:
    """How many times fewer completions a method needs than the reference, for the same accuracy."""

    target: float  # That accuracy; NaN if the reference sets none, and then so is the rest
    method_x: float  # Infinite if the method never reaches the target
    factor: float  # x of the reference over it, 0 likewise; 30 = the reference needs 30 times as many
    low: float
    """95 % interval; 0 if more than 2.5 % of the resamples do not reach the target; NaN below two seeds."""
    high: float


def sample_efficiency(reference: Band, method: Band, *, start: float | None = None) -> Factor:
    """Compares the completions that reference and method, smoothed alike, need for the same accuracy.

    The target is the accuracy of the reference at its end (Band.end), of its seeds that get there. Both
    curves are read as far as their ends and in the same way: the first logged x > 0 at which the smoothed
    centre is at or above the target. A target that is not above `start`, the accuracy before training (None
    = the reference's first point), is none: any curve has it after its first step.

    The interval is the percentile bootstrap over seeds of both, each draw with a target of its own. A draw
    in which the method does not reach its target has factor 0; one without a target is left out. With few
    seeds it is too narrow, as that of a mean (core/intervals.py).
    """
    at_end = np.isfinite(reference.values[:, reference.end])
    values = reference.values[at_end, : reference.end + 1]
    x, centre, seeds = (part[..., : method.end + 1] for part in (method.x, method.centre, method.values))
    ask = partial(_first_reached, reference.x[: reference.end + 1], x, start)
    found = ask(centre_of_seeds(values, reference.statistic)[None], centre[None])
    target, before, after = (float(each[0]) for each in found)
    low, high = np.nan, np.nan
    if np.isfinite(target) and min(len(values), method.seeds) >= 2:
        draws = [_resampled(values, reference.statistic, 0), _resampled(seeds, method.statistic, 1)]
        targets, befores, afters = ask(*draws)
        factors, tails = (befores / afters)[np.isfinite(targets)], ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        if len(factors):
            low, high = (float(q) for q in np.quantile(factors, tails, method="inverted_cdf"))
    return Factor(target, after, before / after, low, high)


def _first_reached(
    x: Array, method_x: Array, start: float | None, reference: Array, method: Array
) -> tuple[Array, Array, Array]:
    """Returns the target, and the first x of the reference [r, n] and of the method [r, m] at it, [r] each.

    They are NaN where the reference sets no target, infinite where the method does not reach it.
    """
    there, row = np.isfinite(reference), np.arange(len(reference))
    first, target = reference[row, there.argmax(1)], reference[row, -1 - there[:, ::-1].argmax(1)]
    before = _first_x(x, reference, target)
    sets = (target > (first if start is None else start)) & np.isfinite(before)
    after = _first_x(method_x, method, target)
    return np.where(sets, target, np.nan), np.where(sets, before, np.nan), np.where(sets, after, np.nan)


def _first_x(x: Array, curves: Array, target: Array) -> Array:
    hit = (curves >= target[:, None]) & (x > 0)
    return np.where(hit.any(axis=1), x[hit.argmax(axis=1)], np.inf)


def _resampled(values: Array, statistic: Statistic, stream: int) -> Array:
    seeds = len(values)
    draws = np.random.default_rng(stream).integers(0, seeds, (RESAMPLES, seeds))
    return np.concatenate(
        [centre_of_seeds(values[part], statistic, axis=1) for part in np.array_split(draws, 20)]
    )


def collapse(x: Array, y: Array, start: float, alpha: float) -> float | None:
    """Returns where one seed, [n] each, collapses; None if it does not.

    It has collapsed if its smoothed accuracy, after its peak, has lost at least half of what it had gained
    by then, peak - start, and more than noise takes: NOISE_DROP standard deviations of its smoothed curve,
    where it has FEW values or more. The collapse is the first such x. The peak is never below `start`, so a
    run that breaks at once has collapsed; a run that later rises above its old peak has a new one, and has
    not. A curve of fewer than FEW values can collapse by noise alone.

    With the bound on noise at most 1 % of seeds that learn nothing "collapse", if the curve begins with its
    accuracy before training, `start` (up to 20 % if it begins with the noise of one step); of runs that gain
    0.15 and lose all of it again, 99 % are found (simulated: 100 steps of 96 completions, smoothing 0.1).
    """
    height, after = max(float(y.max()), start), _from_peak(y, start)
    loss = height - y[after]
    fallen = (loss >= (height - start) / 2) & (loss > NOISE_DROP * noise(y, alpha))
    return float(x[after][fallen.argmax()]) if fallen.any() else None


def worst(y: Array, start: float) -> float:
    """Returns the lowest point of one seed, [n], from its highest on."""
    return float(y[_from_peak(y, start)].min())


def has_kept(y: Array) -> bool:
    """Returns whether one seed, [n], ends with KEPT of its peak's accuracy, or more."""
    return bool(y[-1] >= KEPT * y.max())


def _from_peak(y: Array, start: float) -> slice:
    return slice(int(y.argmax()) if y.max() >= start else 0, None)


def points(band: Band) -> list[Points]:
    """Returns x and values of each seed where it has them."""
    return [(band.x[there], y[there]) for there, y in zip(np.isfinite(band.values), band.values, strict=True)]


def mean_height(x: Array, y: Array) -> float:
    """Returns the mean height of a curve, [n] each: the area under it over its length."""
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def lead(own: Points, other: Points) -> float:
    """Returns the area of one curve less that of another over the x that both have; NaN if there is none."""
    grid = np.union1d(own[0], other[0])
    grid = grid[(grid >= max(own[0][0], other[0][0])) & (grid <= min(own[0][-1], other[0][-1]))]
    return mean_height(grid, np.interp(grid, *own) - np.interp(grid, *other)) if len(grid) else np.nan


def share(count: int, seeds: int) -> Estimate:
    """Returns the share of seeds with Wilson's interval."""
    wilson = stats.binomtest(count, seeds).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / seeds, float(wilson.low), float(wilson.high))


def noise(smooth: Array, alpha: float) -> float:
    """Returns the standard deviation of a moving average [n] from step to step noise; 0 below FEW values.

    It is from the median difference of neighbours before smoothing: neither a trend nor a jump is noise.
    """
    if len(smooth) < FEW:
        return 0.0
    raw = smooth[1:] - (1 - alpha) * smooth[:-1]  # times alpha
    spread = np.median(np.abs(np.diff(raw))) / stats.norm.ppf(0.75) / np.sqrt(2)
    return float(spread / alpha * np.sqrt(alpha / (2 - alpha)))
