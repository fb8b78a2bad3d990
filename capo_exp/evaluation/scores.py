"""Verdicts on a benchmark -> avg@n, pass@k, maj@k with 95 % intervals over problems. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capo_exp.core.intervals import Estimate, bootstrap

Vector = NDArray[np.float64]
"""[P], one number a problem."""

RESAMPLES = 9_999
SUBSETS = 256
"""Choices of k of n samples that maj@k is averaged over, at most."""


@dataclass(frozen=True)
class Solved:
    """What became of one problem: one entry a sample."""

    correct: tuple[bool, ...]
    classes: tuple[int, ...]
    """Which samples gave the same answer: equal numbers; -1 = no answer."""


def estimate(*benchmarks: Vector) -> Estimate:
    """The unweighted mean over benchmarks of the mean over problems.

    The interval is that of a percentile bootstrap that draws the problems of each benchmark again. It says
    how much the score depends on which problems were asked, and with few samples a problem, also on chance.
    With a handful of problems that differ it is too narrow; where none differ there is none.

    Source: CAPO's TEST accuracy is this mean over eight benchmarks.
    """
    value = float(np.mean([np.mean(vector) for vector in benchmarks]))
    if min(map(len, benchmarks)) < 2 or all((vector == vector[0]).all() for vector in benchmarks):
        return Estimate(value)

    def mean_of_means(*samples: Vector, axis: int) -> Vector:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    low, high = bootstrap(benchmarks, mean_of_means, resamples=RESAMPLES, batch=500)
    return Estimate(value, float(low), float(high))


def average(problems: Sequence[Solved]) -> Vector:
    """Share of right samples of each problem; its mean is avg@n."""
    return np.array([np.mean(problem.correct) for problem in problems], dtype=float)


def pass_at(problems: Sequence[Solved], k: int) -> Vector:
    """Chance that at least one of k samples, drawn from the n without putting back, is right.

    Unbiased: 1 - C(n - c, k) / C(n, k) with c right ones. Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.

    Raises:
        ValueError: k is above the number of samples of a problem.
    """
    samples = np.array([len(problem.correct) for problem in problems], dtype=float)
    if not 1 <= k <= samples.min():
        raise ValueError(f"got k={k}, expected 1 to {samples.min():.0f}, the samples of a problem")
    wrong = samples - np.array([sum(problem.correct) for problem in problems])
    drawn = np.arange(k)[:, None]
    return 1 - np.prod(np.clip((wrong - drawn) / (samples - drawn), 0, None), axis=0)


def majority_at(problems: Sequence[Solved], k: int) -> Vector:
    """Chance that the most frequent answer of k samples is right; ties are broken by lot.

    Samples without an answer have no vote; if none of the k has one, the problem counts as wrong. Exact where
    there are at most SUBSETS ways to choose k of n; else the mean over as many random ones, always the same.
    """
    draws = np.random.default_rng(0)
    return np.array([_majority(problem, k, draws) for problem in problems], dtype=float)


def _majority(problem: Solved, k: int, draws: np.random.Generator) -> float:
    classes, correct = np.array(problem.classes), np.array(problem.correct)
    numbers = np.unique(classes[classes >= 0])
    if not len(numbers):
        return 0.0
    right = np.array([correct[classes == number].mean() for number in numbers])
    votes = (classes[_chosen(len(classes), k, draws)][:, :, None] == numbers).sum(1)
    first = (votes == votes.max(1, keepdims=True)) & (votes > 0)
    return float(((first * right).sum(1) / np.maximum(first.sum(1), 1)).mean())


def _chosen(n: int, k: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """[subsets, k], indices below n."""
    if comb(n, k) <= SUBSETS:
        return np.array(list(combinations(range(n), k)))
    return draws.random((SUBSETS, n)).argsort(axis=1)[:, :k]


def sizes(problems: Sequence[Solved]) -> list[int]:
    """The k of pass@k and maj@k: powers of two up to the samples that every problem has, and that number."""
    n = min(len(problem.correct) for problem in problems)
    return sorted({n, *(2**i for i in range(n.bit_length()))})


def summary(problems: Sequence[Solved]) -> dict[str, Any]:
    """All scores of a benchmark, as plain numbers."""
    ks = sizes(problems)
    return {
        "average": vars(estimate(average(problems))),
        "pass_at": {str(k): vars(estimate(pass_at(problems, k))) for k in ks},
        "majority_at": {str(k): vars(estimate(majority_at(problems, k))) for k in ks},
    }
