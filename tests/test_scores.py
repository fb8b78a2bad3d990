"""avg@n, pass@k, maj@k against enumeration, and intervals that hold what they should."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_exp.core.intervals import Estimate
from capo_exp.evaluation import scores
from capo_exp.evaluation.scores import Solved, choose_sizes, estimate, majority_at, pass_at, summarise_scores


def solved(correct, classes=None):
    """`10` = right, wrong; classes as letters, - = no answer. Without classes: one for each verdict."""
    letters = classes if classes is not None else correct
    numbers = {letter: number for number, letter in enumerate(sorted(set(letters) - {"-"}))}
    return Solved(tuple(c == "1" for c in correct), tuple(numbers.get(letter, -1) for letter in letters))


bits = st.lists(st.booleans(), min_size=1, max_size=7)


@given(bits, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(itertools.combinations(correct, k))
    expected = Fraction(sum(map(any, subsets)), len(subsets))
    problem = Solved(tuple(correct), tuple(map(int, correct)))
    assert pass_at([problem], k) == pytest.approx([float(expected)])


def test_pass_at_k_for_problems_with_different_numbers_of_samples():
    assert pass_at([solved("10"), solved("1000")], 2) == pytest.approx([1, 0.5])
    with pytest.raises(ValueError, match="got k=3, expected 1 to 2"):
        pass_at([solved("10"), solved("1000")], 3)


def by_hand(problem, k):
    """The plurality of every subset, ties shared, by counting."""
    values = []
    for subset in itertools.combinations(range(len(problem.correct)), k):
        votes = [problem.classes[i] for i in subset if problem.classes[i] >= 0]
        most = max((votes.count(v) for v in votes), default=0)
        top = sorted({v for v in votes if votes.count(v) == most})
        right = [
            np.mean([c for c, n in zip(problem.correct, problem.classes, strict=True) if n == v]) for v in top
        ]
        values.append(np.mean(right) if right else 0.0)
    return float(np.mean(values))


@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 3)), min_size=1, max_size=7), st.data())
@settings(deadline=None)
def test_majority_at_k_is_the_plurality_of_every_subset(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    problem = Solved(tuple(c for c, _ in samples), tuple(n for _, n in samples))
    assert majority_at([problem], k) == pytest.approx([by_hand(problem, k)])


def test_majority_of_many_samples_is_near_the_truth_and_the_same_twice():
    problem = solved("1" * 6 + "0" * 10, "a" * 6 + "bbbbb" + "ccccc")
    exact = by_hand(problem, 8)
    assert math.comb(16, 8) > scores.SUBSETS
    assert majority_at([problem], 8) == pytest.approx([exact], abs=4 * 0.5 / scores.SUBSETS**0.5)
    assert majority_at([problem], 8) == majority_at([problem], 8)


def test_estimate_is_the_unweighted_mean_over_benchmarks():
    small, large = np.ones(10), np.zeros(90)
    assert estimate(small, large) == Estimate(0.5, None, None)  # all alike: nothing to draw from
    assert estimate(np.zeros(30)) == Estimate(0.0, None, None)
    assert estimate(np.concatenate([small, large])).value == pytest.approx(0.1)
    assert estimate(np.array([0.5]), large) == Estimate(0.25, None, None)


def test_intervals_are_two_standard_errors_and_benchmarks_add_their_variances():
    first, second = np.random.default_rng(1).random((2, 400))
    for values in ([first], [first, second[:100]]):
        found, half = estimate(*values), 1.96 / len(values) * sum(v.var() / len(v) for v in values) ** 0.5
        middle = np.mean([v.mean() for v in values])
        assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=0.1 * half)


def test_summary_is_plain_numbers():
    found = summarise_scores([solved("1100", "aabc"), solved("0000", "abcd")])
    assert found["average"] == {"value": 0.25, "low": 0.0, "high": 0.5}
    assert found["pass_at"]["4"]["value"] == 0.5
    assert list(found["majority_at"]) == ["1", "2", "4"]
    unread = [Solved((True, True), (-1, -1)), Solved((False, False), (-1, -1))]
    assert summarise_scores(unread)["majority_at"] == {}  # a reward function extracts nothing: no 0 of votes
    sizes = [choose_sizes([solved("1" * n) for n in counts]) for counts in ([6, 9], [16], [1])]
    assert sizes == [[1, 2, 4, 6], [1, 2, 4, 8, 16], [1]]
