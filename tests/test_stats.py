"""Statistics on curves whose answer is known by construction."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from capo_exp.core.intervals import RESAMPLES, Interval, Statistic, centre_of_seeds, ema, interval
from capo_exp.figures.bands import band
from capo_exp.figures.stats import (
    collapse,
    has_kept,
    lead,
    mean_height,
    noise,
    points,
    sample_efficiency,
    share,
    worst,
)
from capo_exp.runs.read import LoggedRun, to_its_end
from tests.figure_pieces import NO_WARNINGS

X, STEP, KEY = "counter/completions", "counter/rollout_step", "reward/accuracy"
KINDS: tuple[Interval, ...] = ("bootstrap", "t", "sem")
STATISTICS: tuple[Statistic, ...] = ("mean", "iqm")
NAN = float("nan")

pytestmark = NO_WARNINGS


def run(values, size=10, first=1, **more):
    """One row a step, `size` completions each."""
    rows = [{STEP: first + i, X: size * (first + i), KEY: value} for i, value in enumerate(values)]
    return LoggedRun(Path("x"), {}, {}, rows, more.get("evaluations", []))


def drawn(runs, alpha=1.0, statistic="mean", kind="t", **more):
    options = {"x": X, "statistic": statistic, "interval": kind, "alpha": alpha} | more
    found = band(runs, options.pop("key", KEY), **options)
    assert found is not None
    return found


def of(values, size=10, alpha=1.0):
    return drawn([run(each, size) for each in values], alpha)


def test_moving_average_by_hand():
    np.testing.assert_allclose(ema(np.array([1.0, 2.0, 4.0]), 0.5), [1.0, 1.5, 2.75])
    np.testing.assert_allclose(ema(np.array([NAN, 1.0, NAN, 2.0]), 0.25), [NAN, 1.0, NAN, 1.25])
    values = np.random.default_rng(0).normal(size=50)
    np.testing.assert_array_equal(ema(values, 1.0), values)
    assert ema(np.array([]), 0.1).shape == (0,)
    assert np.isnan(ema(np.array([NAN, NAN]), 0.1)).all()


@pytest.mark.parametrize("seeds", (1, 3, 4, 7, 12))
def test_the_interquartile_mean_is_that_of_scipy(seeds):
    values = np.random.default_rng(seeds).normal(size=(seeds, 6))
    expected = scipy_stats.trim_mean(values, 0.25, axis=0)
    np.testing.assert_allclose(centre_of_seeds(values, "iqm"), expected)
    holes = np.insert(values, seeds // 2, NAN, axis=0)  # not by scipy
    np.testing.assert_allclose(centre_of_seeds(holes, "iqm"), expected)
    np.testing.assert_allclose(centre_of_seeds(holes.T, "iqm", axis=1), expected)
    np.testing.assert_allclose(centre_of_seeds(values.T, "mean", axis=1), values.mean(axis=0))


def test_a_centre_leaves_nan_out():
    values = np.array([[1.0, NAN, 9.0], [2.0, NAN, NAN], [3.0, NAN, NAN], [NAN, NAN, NAN], [9.0, NAN, NAN]])
    np.testing.assert_allclose(centre_of_seeds(values, "mean"), [3.75, NAN, 9.0])
    np.testing.assert_allclose(centre_of_seeds(values, "iqm"), [2.5, NAN, 9.0])


def test_intervals_of_the_mean_are_those_of_scipy():
    values = np.random.default_rng(0).normal(size=7)
    error = scipy_stats.sem(values)
    low, high = interval(values, "mean", "t")
    np.testing.assert_allclose((low, high), scipy_stats.t.interval(0.95, 6, values.mean(), error))
    np.testing.assert_allclose(
        interval(values, "mean", "sem"), [values.mean() - error, values.mean() + error]
    )
    low, high = interval(values, "mean", "bootstrap")
    expected = values.mean() + 1.96 * values.std() / np.sqrt(7) * np.array([-1, 1])  # its large-sample limit
    np.testing.assert_allclose((low, high), expected, atol=0.1)
    assert low.shape == high.shape == ()


def test_yuens_standard_error_by_hand():
    """8 seeds: 2 cut at either end, 4 kept; winsorised 3 3 3 4 5 6 6 6, squares about 4.5 sum to 14."""
    low, high = interval(np.array([1.0, -9.0, 3.0, 4.0, 5.0, 6.0, 99.0, 7.0]), "iqm", "sem")
    error = np.sqrt(14 / (4 * 3))
    np.testing.assert_allclose((low, high), [4.5 - error, 4.5 + error])
    low, high = interval(np.array([1.0, -9.0, 3.0, 4.0, 5.0, 6.0, 99.0, 7.0]), "iqm", "t")
    np.testing.assert_allclose(high - low, 2 * 3.18245 * error, rtol=1e-5)  # Student, 3 degrees of freedom


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_degenerate_intervals(statistic, kind):
    values = np.array(
        [[0.1, NAN, 0.5, 1.0], [0.1, NAN, NAN, 2.0], [0.1, NAN, NAN, NAN], [0.1, NAN, NAN, NAN]]
    )
    low, high = interval(values, statistic, kind)
    np.testing.assert_allclose([low[0], high[0]], 0.1)
    assert np.isnan([low[1:3], high[1:3]]).all()
    assert low[3] < 1.5 < high[3]
    for few in (values[:1], values[:0]):
        assert np.isnan(interval(few, statistic, kind)).all()
    assert interval(values[:, :0], statistic, kind)[0].shape == (0,)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_each_column_is_resampled_as_if_it_were_alone(statistic):
    values = np.random.default_rng(0).normal(size=(5, 4))
    values[4, 2:] = NAN
    low, high = interval(values, statistic, "bootstrap")
    for column in range(4):
        alone = interval(values[:, column], statistic, "bootstrap")
        np.testing.assert_allclose([low[column], high[column]], alone)


COVERED = {(3, "iqm"): (0.75, 0.95, 0.58), (5, "mean"): (0.84, 0.95, 0.63), (10, "iqm"): (0.94, 0.94, 0.63)}
"""Of the table in capo_exp/core/intervals.py."""


@pytest.mark.parametrize(("seeds", "statistic"), COVERED)
def test_coverage_is_as_the_docstring_says(seeds, statistic):
    values = np.random.default_rng(1).normal(size=(seeds, 800))
    for kind, expected in zip(KINDS, COVERED[seeds, statistic], strict=True):
        low, high = interval(values, statistic, kind)
        assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(expected, abs=0.03)


def test_a_band_by_hand():
    rows = [[0.0, 1.0, 1.0, *[1.0] * 7], [1.0, 1.0, 0.0, *[0.5] * 7]]  # ten points, so that they are smoothed
    found = drawn([run(row) for row in rows], alpha=0.5)
    np.testing.assert_allclose(found.x[:3], [10, 20, 30])
    np.testing.assert_allclose(found.values[:, :3], [[0.0, 0.5, 0.75], [1.0, 1.0, 0.5]])
    np.testing.assert_allclose(found.centre[:3], [0.5, 0.75, 0.625])
    half = 12.7062 * 0.5 * np.array([1, 0.5, 0.25])
    np.testing.assert_allclose((found.high - found.centre)[:3], half, rtol=1e-5)
    assert (found.seeds, found.statistic, found.alpha, found.end, found.unsmoothed) == (2, "mean", 0.5, 9, 0)
    short = drawn([run(rows[0][:9]), run(rows[1])], alpha=0.5)
    np.testing.assert_allclose(short.values[:, :3], [[0.0, 1.0, 1.0], [1.0, 1.0, 0.5]])
    assert short.unsmoothed == 1


def test_where_seeds_end():
    """Before the others, before their plan, or where they were stopped for want of reward."""
    whole = run([0.5] * 6)
    assert drawn([whole, run([0.5] * 4), run([0.5] * 4)]).losses == [(40, 1)]
    assert drawn([whole, whole]).losses == []
    planned = replace(whole, config={"num_steps": 8})
    assert drawn([planned, planned]).losses == [(60, 0)]
    assert drawn([replace(whole, config={"num_steps": 6})]).losses == []
    metrics = [{**row, "counter/unrewarded_steps": row[STEP]} for row in planned.metrics]
    record, config = (
        {"status": "finished"},
        {"num_steps": 8, "regime": {"prompts_per_step": 5, "group_size": 2}},
    )
    stopped = to_its_end(replace(planned, metrics=metrics, record=record, config=config))
    for plan in ({}, {"num_steps": 8}, config | {"num_steps": 10**12}, config | {"regime": {}}):
        damaged = replace(planned, metrics=metrics, record=record, config=plan)
        assert to_its_end(damaged) is damaged
    found = drawn([stopped, run([0.5] * 8)])
    assert found.losses == [(60, 1)] and found.values[0, -1] == 0


@pytest.mark.parametrize("x", ["counter/optimizer_step", "counter/prompts", "counter/generated_tokens"])
def test_a_run_without_reward_counts_as_zero_along_every_x(x):
    """It ended after 2 of 4 steps; its last evaluation and its last test stand at the end."""
    rows = [{STEP: s, X: 10 * s, x: 3 * s, KEY: 0.5, "counter/unrewarded_steps": s} for s in (1, 2)]
    held_out = [
        {STEP: 0, x: 0, X: 0, key: value} for key, value in (("eval/accuracy", 0.4), ("test/accuracy", 0.3))
    ]
    config = {"num_steps": 4, "regime": {"prompts_per_step": 5, "group_size": 2}}
    stopped = to_its_end(LoggedRun(Path("x"), config, {"status": "finished"}, rows, held_out))
    for key, values in (
        (KEY, [0.5, 0.5, 0, 0]),
        ("eval/accuracy", [0.4, 0.4]),
        ("test/accuracy", [0.3, 0.3]),
    ):
        found = drawn([stopped], key=key, x=x)
        assert (found.x[-1], list(found.values[0])) == (12, values)


def test_no_run_has_the_metric():
    options = {"x": X, "statistic": "mean", "interval": "t", "alpha": 1.0}
    for runs, key in (([], KEY), ([run([0.5])], "loss/kl"), ([run([None])], KEY)):
        assert band(runs, key, **options) is None
    only = band([run([0.5]), LoggedRun(Path("y"), {}, {}, [{X: 10}], [])], KEY, **options)
    assert only is not None and only.seeds == 1 and np.isnan(only.low).all()
    rows = [{STEP: 0, X: 0, "eval/accuracy": 0.2}, {STEP: 5, X: 50, "eval/accuracy": 0.4}]
    found = drawn([run([0.9], evaluations=rows)], key="eval/accuracy", x=STEP)
    np.testing.assert_array_equal([found.x, found.centre], [[0, 5], [0.2, 0.4]])


def test_several_values_at_one_x_count_as_their_mean_before_smoothing():
    rows = [{X: 10 * (1 + i // 2), KEY: float(i)} for i in range(20)] + [{X: 100, KEY: None}]
    found = drawn([LoggedRun(Path("x"), {}, {}, rows, [])], alpha=0.5)
    np.testing.assert_allclose(found.centre[:3], [0.5, 1.5, 3.0])
    assert len(found.x) == 10


def test_runs_of_different_length_and_missing_values():
    found = drawn([run([1.0, 2.0]), run([3.0, None, 5.0]), run([5.0, 4.0, 7.0, 8.0])])
    np.testing.assert_allclose(found.x, [10, 20, 30, 40])
    np.testing.assert_allclose(found.centre, [3.0, 3.0, 6.0, 8.0])
    np.testing.assert_array_equal(found.count, [3, 2, 2, 1])
    assert np.isfinite(found.low[:3]).all() and np.isnan(found.low[3])
    assert found.end == 2  # one seed of three is not the curve
    apart = drawn([run([1.0, 2.0]), run([5.0, 6.0], first=8)])
    assert apart.count.max() == 1 and apart.end == len(apart.x) - 1
    assert drawn([run([1.0, 2.0]), run([1.0, 2.0, 3.0])]).end == 1  # nor is one of two


def test_x_that_few_seeds_have_are_left_out_but_never_filled_in():
    often = [run([float(i) for i in range(11)], first=0) for _ in range(3)]
    rare = run([100.0, 100.0, 100.0], size=40, first=0)  # 0, 40, 80
    found = drawn([*often, rare])
    np.testing.assert_allclose(found.x, [10 * i for i in range(11)])
    np.testing.assert_array_equal(found.count, [4, 3, 3, 3, 4, 3, 3, 3, 4, 3, 3])
    assert found.centre[1] == 1.0 and found.centre[4] == 28.0
    odd = run([100.0, 100.0, 100.0], size=45, first=0)  # 45 is nobody else's
    found = drawn([*often, odd])
    np.testing.assert_allclose(found.x, [10 * i for i in range(11)])
    np.testing.assert_array_equal(found.count, [4, *[3] * 8, 4, 3])


def test_seeds_whose_x_differ_are_interpolated_within_their_own_range():
    runs = [run([s * i for i in range(1, 11)], size=s) for s in (10.0, 11.0, 12.0)]  # each is y = x
    found = drawn(runs)
    np.testing.assert_allclose(found.centre, found.x)
    assert len(found.x) == 10 and (found.x[0], found.x[-1]) == (10, 120)
    assert found.count[0] == 1 and found.count[4] == 3 and found.count[-1] == 1
    for row, size in zip(found.values, (10, 11, 12), strict=True):
        there = np.isfinite(row)
        assert found.x[there].min() >= size and found.x[there].max() <= 10 * size
    np.testing.assert_allclose(found.high[4], found.centre[4])


def step_at(x, *, end, low=0.2, high=0.7):
    """Jumps from low to high at the x-th step."""
    return [low if i < x else high for i in range(1, end + 1)]


def test_the_factor_of_step_functions_is_exact():
    reference = of([step_at(30, end=50)] * 3, size=120)
    method = of([step_at(12, end=40)] * 3, size=10)
    found = sample_efficiency(reference, method)
    assert found.target == pytest.approx(0.7) and found.method_x == 120
    assert (found.factor, found.low, found.high) == (30, 30, 30)


def test_the_reference_is_read_as_the_method_is():
    """It counts where the reference first is as good as at its end, not where it ends."""
    reference = of([[0.2, 0.6, 0.5, 0.5, 0.5]] * 2)
    found = sample_efficiency(reference, reference)
    assert (found.target, found.method_x, found.factor) == (0.5, 20, 1)
    smooth = of([step_at(30, end=50)] * 2, size=120, alpha=0.1)  # its end is reached at its end only
    found = sample_efficiency(smooth, of([step_at(12, end=200)] * 2, alpha=0.1))
    assert found.target == pytest.approx(0.7 - 0.5 * 0.9**21)
    assert (found.factor, found.method_x) == (
        50 * 120 / 320,
        10 * (11 + 21),
    )  # as many steps after the jump as the reference has


def test_seeds_that_do_not_get_there_count():
    """One seed of four reaches the target 10 times as fast, the others never: the mean does if that seed is
    drawn twice."""
    reference = of([step_at(10, end=20, low=0.0, high=0.5)] * 4)
    method = of([step_at(1, end=20, low=0.0, high=1.0), [0.0] * 20, [0.0] * 20, [1e-9] * 20])
    found = sample_efficiency(reference, method)
    assert (found.factor, found.low, found.high) == (0, 0, 10)


@pytest.mark.parametrize(("lazy", "low"), [(0.025, 10), (0.026, 0)])
def test_the_lower_bound_is_zero_once_more_than_a_fortieth_do_not_get_there(lazy, low, monkeypatch):
    def resampled(values, statistic, stream):
        curves = np.repeat(values[:1], RESAMPLES, axis=0)
        if stream == 1:
            curves[: int(lazy * RESAMPLES)] = 0.0
        return curves

    monkeypatch.setattr("capo_exp.figures.stats._resampled", resampled)
    found = sample_efficiency(of([step_at(10, end=20)] * 3), of([step_at(1, end=20)] * 3))
    assert (found.low, found.factor) == (low, 10)


FLAT = [[0.2] * 9] * 3


@pytest.mark.parametrize(
    ("reference", "method", "start", "target", "factor"),
    [
        ([step_at(3, end=9)] * 3, FLAT, None, 0.7, (0, 0, 0)),  # never gets there
        ([[0.2, 0.5]] * 2, [[0.6, 0.6]] * 2, None, 0.5, (2, 2, 2)),
        ([[0.5, 0.6]] * 2, [[0.55, 0.6]] * 2, 0.55, 0.6, (1, 1, 1)),
        ([[0.5, 0.6]] * 2, [[0.55, 0.6]] * 2, 0.6, NAN, (NAN, NAN, NAN)),
        # one seed of the reference gains, one loses: draws of twice the latter set no target, are left out
        ([[0.0, 0.5], [0.2, 0.1]], [[0.0, 0.6]] * 2, None, 0.3, (1, 1, 1)),
        ([step_at(4, end=9)], [step_at(2, end=9)] * 2, None, 0.7, (2, NAN, NAN)),  # one seed: no interval
        ([step_at(2, end=9)] * 2, [step_at(4, end=9)], None, 0.7, (0.5, NAN, NAN)),
        ([[0.5, 0.4]], FLAT, None, NAN, (NAN, NAN, NAN)),
        # a reference that stays, comes back or collapses sets no target, whatever the method does
        ([[0.5] * 9] * 3, [[0.5, 0.6, 0.9]] * 3, None, NAN, (NAN, NAN, NAN)),
        ([[0.5, 0.6, 0.4]] * 3, [[0.5, 0.6, 0.9]] * 3, None, NAN, (NAN, NAN, NAN)),
        ([step_at(3, end=9, low=0.7, high=0.2)] * 3, [[0.5, 0.6, 0.9]] * 3, None, NAN, (NAN, NAN, NAN)),
    ],
)
def test_factors_by_hand(reference, method, start, target, factor):
    found = sample_efficiency(of(reference), of(method), start=start)
    assert found.target == pytest.approx(target, nan_ok=True)
    np.testing.assert_equal([found.factor, found.low, found.high], factor)
    assert np.isinf(found.method_x) == (found.factor == 0)


def test_a_seed_of_the_reference_that_is_still_going_sets_no_target():
    whole, begun, longer = step_at(6, end=9), step_at(6, end=9)[:3], [*step_at(6, end=9), 0.8, 0.8]
    reference = drawn([run(whole), run(whole), run(longer), run(begun), run([0.9, 0.9])])
    found = sample_efficiency(reference, of([step_at(3, end=9)] * 2))
    assert reference.end == 8
    assert (found.factor, found.low, found.high) == (2, 2, 2)


def test_a_survivor_alone_earns_no_factor():
    """Four seeds of five die after two steps at 0.3, one goes on to 0.9."""
    reference = of([[0.2, 0.4, 0.6]] * 2)
    dead = [run([0.3, 0.3])] * 4
    found = sample_efficiency(reference, drawn([*dead, run([0.3, 0.3, 0.5, 0.7, 0.9])]))
    assert (found.factor, found.low, found.high) == (0, 0, 0)


def test_the_interval_of_a_factor_holds_it_as_often_as_it_should():
    """Ramps that reach the target at 400 and 40 completions, by seeds' slopes; few seeds: below 95 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(25):
        slopes = rng.normal(1.0, 0.1, size=(2, 8))
        ramp = np.arange(1, 101)
        reference = of((slopes[0][:, None] * ramp[:40] / 50).tolist(), size=10)
        method = of((slopes[1][:, None] * ramp / 50).tolist(), size=1)
        found = sample_efficiency(reference, method)
        held += found.low <= 10 <= found.high
    assert 0.8 < held / 25 <= 1


def test_noise_is_that_of_the_smoothed_curve():
    rng = np.random.default_rng(0)
    for alpha in (0.05, 0.35, 1.0):
        raw = rng.normal(0.5, 0.05, 20_000)
        smooth = ema(raw, alpha)
        assert noise(smooth, alpha) == pytest.approx(smooth[1000:].std(), rel=0.05)
        trend = ema(raw + np.linspace(0, 3, 20_000), alpha)  # neither a trend
        trend[10_000:] = ema(raw[10_000:] - 3, alpha)  # nor a jump is noise
        assert noise(trend, alpha) == pytest.approx(smooth[1000:].std(), rel=0.05)
    assert noise(raw[:19], 1.0) == 0 < noise(raw[:20], 1.0)


def collapses(found, start):
    """Where each seed does; None where it does not."""
    return [collapse(*own, start, found.alpha) for own in points(found)]


def test_a_collapse_at_a_known_step():
    rises = [0.4 + 0.01 * i for i in range(20)]
    falls = [*rises, 0.59, 0.55, 0.51, 0.49, 0.2, 0.3]
    assert collapses(of([falls, [*rises, *[0.59] * 6]]), 0.4) == [240, None]
    expected, found = scipy_stats.binomtest(1, 2).proportion_ci(0.95, method="wilson"), share(1, 2)
    assert (found.value, found.low, found.high) == (0.5, expected.low, expected.high)


@pytest.mark.parametrize(
    ("curve", "where"),
    [
        ([0.4, 0.6, 0.8, 0.61, 0.61], None),  # has lost less than half
        ([0.4, 0.6, 0.8, 0.59, 0.61], 40),
        ([0.4, 0.8, 0.5, 0.9, 0.9], None),  # came back, higher
        ([0.4, 0.8, 0.5, 0.7, 0.7], 30),  # came back, not quite
        ([0.4, 0.1, 0.1, 0.1], 20),  # broke at once
        ([0.1, 0.1, 0.1, 0.1], 10),  # before the first row
        ([0.1, 0.3, 0.3], 10),  # never as good as before training
        ([0.4, 0.5, 0.6, 0.7], None),
        ([0.4], None),
    ],
)
def test_what_a_collapse_is(curve, where):
    assert collapses(of([curve]), 0.4) == [where]
    from_peak = curve[curve.index(max(curve)) :] if max(curve) >= 0.4 else curve
    assert worst(np.array(curve), 0.4) == min(from_peak)


@pytest.mark.parametrize(("final", "kept"), [(0.73, True), (0.71, False), (0.8, True), (0.2, False)])
def test_a_peak_is_kept_to_nine_tenths_of_its_accuracy(final, kept):
    assert has_kept(np.array([0.4, 0.8, 0.1, final])) == kept
    assert has_kept(np.array([0.4, 0.6, 0.8]))


def test_the_area_is_a_mean_height_at_any_spacing_over_each_seeds_own_length():
    x = np.array([10.0, 20.0, 110.0])
    for curve, area in (([0.0, 0.0, 1.0], 0.45), ([0.0, 1.0, 1.0], 0.95)):
        assert mean_height(x, np.array(curve)) == pytest.approx(area)
    found = [mean_height(*own) for own in points(of([[0.0, 1.0, 1.0], [0.2, 0.4, NAN], [NAN, 0.3, NAN]]))]
    assert found == pytest.approx([0.75, 0.3, 0.3])


@pytest.mark.parametrize(
    ("other_x", "other", "found"),
    [
        ([0, 10, 20], [0.0, 0.0, 0.0], 1.0),
        ([0, 10], [0.0, 0.0], 0.5),  # no further than the other goes
        ([0, 5, 10], [0.0, 0.25, 1.0], 0.125),  # read between its points
        ([10, 20, 90], [0.0, 0.0, 9.0], 1.5),
        ([20, 30], [0.5, 0.5], 1.5),
        ([21, 30], [0.5, 0.5], NAN),
    ],
)
def test_a_lead_is_over_the_x_that_both_have(other_x, other, found):
    """Over a line from 0 at 0 to 2 at 20."""
    own = np.array([0.0, 20.0]), np.array([0.0, 2.0])
    assert lead(own, (np.array(other_x), np.array(other))) == pytest.approx(found, nan_ok=True)


def test_a_seed_that_broke_off_is_judged_as_far_as_it_went():
    assert collapses(drawn([run([0.4, 0.8, 0.1]), run([0.4, 0.6, 0.8, 0.8])]), 0.4) == [30, None]


@pytest.mark.parametrize("alpha", [0.1, 0.35])
def test_noise_alone_is_no_collapse_and_a_real_one_is_found(alpha):
    """Training accuracy of 96 completions a step from 0.45; as simulated for the docstring."""
    rng = np.random.default_rng(0)

    def collapsed(chances):
        seeds = [[0.45, *rng.binomial(96, chances) / 96] for _ in range(150)]
        return np.mean([where is not None for where in collapses(of(seeds, alpha=alpha), 0.45)])

    assert collapsed(np.full(100, 0.45)) < 0.02
    assert collapsed(np.r_[np.linspace(0.45, 0.65, 40), np.full(60, 0.65)]) < 0.02
    lost = np.r_[np.linspace(0.45, 0.65, 40), np.linspace(0.65, 0.45, 10), np.full(50, 0.45)]
    assert collapsed(lost) > 0.95
