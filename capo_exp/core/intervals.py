"""Numbers with their intervals: smoothing of one curve, centre and interval over seeds, the one bootstrap.

Imports no torch.

Share of the 95 % intervals that held the true value, 20,000 experiments with normal seeds
(tests/test_stats.py measures them again):

    seeds  mean: bootstrap  t     sem   iqm: bootstrap  t     sem
    3            0.75       0.95  0.57       0.75       0.95  0.58
    5            0.84       0.95  0.63       0.90       0.94  0.56
    10           0.90       0.95  0.65       0.94       0.94  0.63

So with few seeds the bootstrap's interval is too narrow; t holds what it says where seeds are near normal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Statistic = Literal["mean", "iqm"]
Interval = Literal["bootstrap", "t", "sem"]

TRIMMED = {"mean": 0.0, "iqm": 0.25}
"""Share of the seeds that a statistic leaves out at either end, rounded down: of 3 seeds iqm is the mean."""
LEVEL = 0.95
RESAMPLES = 1000
"""As the paper's alternative to its standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, of 95 % unless another was asked for; None where too little is known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """Says it in per cent, such as `43.2 [41.0, 45.4]`."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def ema(values: Floats, alpha: float) -> Floats:
    """Returns the exponential moving average, [n] -> [n]: s_t = (1 - alpha) s_(t-1) + alpha v_t, s_0 = v_0.

    alpha 1 = off. As pandas' ewm(alpha, adjust=False, ignore_na=True), but what is NaN stays NaN.
    """
    there = np.isfinite(values)
    smooth = np.full(len(values), np.nan)
    smooth[there] = list(accumulate(values[there], lambda before, now: (1 - alpha) * before + alpha * now))
    return smooth


def centre_of_seeds(values: Floats, statistic: Statistic, axis: int = 0) -> Floats:
    """Returns the mean, or interquartile mean, over seeds, of what is not NaN; NaN where nothing else is:
    scipy's trim_mean of whole tables at once, whatever each column lacks."""
    if not np.isnan(values).any() and values.shape[axis]:
        whole = values.mean(axis) if statistic == "mean" else stats.trim_mean(values, TRIMMED["iqm"], axis)
        return np.asarray(whole)
    ordered = np.moveaxis(np.sort(values, axis=axis), axis, -1)  # NaN last
    count = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    cut = (TRIMMED[statistic] * count).astype(int)
    place = np.arange(ordered.shape[-1])
    inside = (place >= cut) & (place < count - cut)
    total = np.where(inside, ordered, 0.0).sum(axis=-1)
    kept = inside.sum(axis=-1)
    return np.where(kept > 0, total / np.maximum(kept, 1), np.nan)


def interval(values: Floats, statistic: Statistic, kind: Interval) -> tuple[Floats, Floats]:
    """Returns bounds of the centre over seeds, [s] -> two of shape [], [s, n] -> two of shape [n].

    Args:
        values: Of each seed; NaN is left out. Below two values the bounds are NaN.
        statistic: What the centre is.
        kind: bootstrap = 95 %, percentiles over resampled seeds; t = 95 %, of Student, with Yuen's standard
            error of a trimmed mean for iqm; sem = plus and minus one standard error, as the paper draws.
    """
    table = np.atleast_2d(values.T).T  # [s, 1] for one number a seed
    bounds = np.full((2, table.shape[1]), np.nan)
    patterns, which = np.unique(np.isfinite(table), axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if pattern.sum() >= 2:
            columns = which.reshape(-1) == number
            dense = table[pattern][:, columns]
            if kind == "bootstrap":
                over = partial(centre_of_seeds, statistic=statistic)
                bounds[:, columns] = bootstrap([dense], over, resamples=RESAMPLES, batch=250)
            else:
                bounds[:, columns] = _student(dense, statistic, kind)
    low, high = bounds.reshape(2, *values.shape[1:])
    return low, high


def seed_estimate(values: Floats, statistic: Statistic, kind: Interval) -> Estimate:
    """Returns the centre of one number a seed, [s], with its interval."""
    bounds = [float(bound) for bound in interval(values, statistic, kind)]
    low, high = bounds if np.isfinite(bounds).all() else (None, None)
    return Estimate(float(centre_of_seeds(values, statistic)), low, high)


def bootstrap(
    samples: Sequence[Floats], statistic: Callable[..., Any], *, resamples: int, batch: int
) -> tuple[Any, Any]:
    """Returns the bounds of a 95 % percentile bootstrap, which draws each sample anew, always the same way.

    Percentiles, as BCa is undefined where all values agree.
    """
    found = stats.bootstrap(
        tuple(samples), statistic, n_resamples=resamples, batch=batch, confidence_level=LEVEL,
        method="percentile", vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    return found.confidence_interval.low, found.confidence_interval.high


def _student(dense: Floats, statistic: Statistic, kind: Interval) -> tuple[Floats, Floats]:
    """Returns bounds by Student's t or the standard error.

    Source: Yuen, Biometrika 61 (1974): the variance of a trimmed mean is that of the winsorised sample.
    """
    seeds = len(dense)
    cut = int(TRIMMED[statistic] * seeds)
    kept = seeds - 2 * cut
    ordered = np.sort(dense, axis=0)
    winsorised = np.clip(dense, ordered[cut], ordered[seeds - 1 - cut])
    error = np.sqrt((seeds - 1) * winsorised.var(axis=0, ddof=1) / (kept * (kept - 1)))
    half = error * (stats.t.ppf((1 + LEVEL) / 2, kept - 1) if kind == "t" else 1.0)
    middle = centre_of_seeds(dense, statistic)
    return middle - half, middle + half
