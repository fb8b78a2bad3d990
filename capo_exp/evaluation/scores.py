"""Verdicts on a benchmark -> avg@n, pass@k, maj@k with 95 % intervals over problems. Imports no torch."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capo_exp.core.intervals import Estimate, bootstrap
from capo_exp.evaluation.majority import number_answers
from capo_exp.grading.verifier import Verifier

Vector = NDArray[np.float64]
"""[P], one number a problem."""
Row = dict[str, Any]
"""A completion or a problem, as parquet has it."""

RESAMPLES = 9_999
SUBSETS = 256
"""Choices of k of n samples that maj@k is averaged over, at most."""


@dataclass(frozen=True)
class Solved:
    """What became of one problem: one entry a sample."""

    correct: tuple[bool, ...]
    classes: tuple[int, ...]  # Which samples gave the same answer: equal numbers; -1 = no answer


def estimate(*benchmarks: Vector) -> Estimate:
    """The unweighted mean over benchmarks of the mean over problems; CAPO's TEST accuracy is that of eight.

    The interval is that of a percentile bootstrap that draws the problems of each benchmark again. With a
    handful of problems that differ it is too narrow; where none differ there is none.
    """
    value = float(np.mean([np.mean(vector) for vector in benchmarks]))
    if min(map(len, benchmarks)) < 2 or all((vector == vector[0]).all() for vector in benchmarks):
        return Estimate(value)

    def mean_of_means(*samples: Vector, axis: int) -> Vector:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    low, high = bootstrap(benchmarks, mean_of_means, resamples=RESAMPLES, batch=500)
    return Estimate(value, float(low), float(high))


def average(problems: Sequence[Solved]) -> Vector:
    """Returns the share of right samples of each problem; its mean is avg@n."""
    return np.array([np.mean(problem.correct) for problem in problems], dtype=float)


def pass_at(problems: Sequence[Solved], k: int) -> Vector:
    """Returns the chance that at least one of k samples, drawn from the n without putting back, is right.

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
    """Returns the chance that the most frequent answer of k samples is right; ties are broken by lot.

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


def choose_sizes(problems: Sequence[Solved]) -> list[int]:
    """Returns the k of pass@k and maj@k: powers of two up to every problem's samples, and their number."""
    n = min(len(problem.correct) for problem in problems)
    return sorted({n, *(2**i for i in range(n.bit_length()))})


def summarise_scores(problems: Sequence[Solved]) -> dict[str, Any]:
    """Returns all scores of a benchmark, as plain numbers; none of majorities where no answer is extracted
    of completions that are right, as by a reward function of one's own."""
    ks = choose_sizes(problems)
    read = any(max(problem.classes) >= 0 for problem in problems)
    voted = read or not any(any(problem.correct) for problem in problems)
    return {
        "average": vars(estimate(average(problems))),
        "pass_at": {str(k): vars(estimate(pass_at(problems, k))) for k in ks},
        "majority_at": {str(k): vars(estimate(majority_at(problems, k))) for k in ks} if voted else {},
    }


def score_rows(rows: Sequence[Row], verifier: Verifier) -> tuple[Row, list[Row]]:
    """Returns scores.json of graded completions, and problems.parquet in the order in which problems appear.

    Args:
        rows: of whole problems: index, id, correct, extracted, reason, gold; where known tokens, truncated,
            level, type.
        verifier: compares answers with each other for maj@k.
    """
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["index"]].append(row)
    answers = [[row["extracted"] for row in group] for group in groups.values()]
    solved = [
        Solved(tuple(row["correct"] for row in group), tuple(numbers))
        for group, numbers in zip(groups.values(), number_answers(answers, verifier), strict=True)
    ]
    problems = [_problem(group, each) for group, each in zip(groups.values(), solved, strict=True)]
    reasons = Counter(row["reason"] for row in rows)
    scores = {
        "problems": len(groups),
        "samples": min(map(len, groups.values())),
        **summarise_scores(solved),
        "no_answer_fraction": reasons["no_answer"] / len(rows),
        "reasons": dict(sorted(reasons.items())),
        "by_level": _by(problems, "level"),
        "by_type": _by(problems, "type"),
    }
    for name, column in (("completion_length", "tokens"), ("truncated_fraction", "truncated")):
        if all(row.get(column) is not None for row in rows):
            scores[name] = fmean(row[column] for row in rows)
    return scores, problems


def _problem(group: Sequence[Row], solved: Solved) -> Row:
    first = group[0]
    votes = Counter(number for number in solved.classes if number >= 0)
    most = votes.most_common(1)[0][0] if votes else None
    return {
        **{name: first.get(name) for name in ("id", "problem", "gold", "level", "type")},
        "samples": len(group),
        "correct": sum(solved.correct),
        "accuracy": fmean(solved.correct),
        "majority_answer": "" if most is None else group[solved.classes.index(most)]["extracted"],
        "majority_votes": 0 if most is None else votes[most],
        "different_answers": len(votes),
    }


def _by(problems: Sequence[Row], column: str) -> dict[str, Row]:
    """Returns avg@n of each value of a column; empty where all problems have the same."""
    values = sorted({str(problem[column] or "") for problem in problems})
    if len(values) < 2:
        return {}
    groups = {value: [p["accuracy"] for p in problems if str(p[column] or "") == value] for value in values}
    return {
        value: {"problems": len(group), **vars(estimate(np.array(group)))} for value, group in groups.items()
    }
