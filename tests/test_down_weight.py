"""selection=down_weight: tokens beyond the bounds count less, in the loss and in the optimiser model."""

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_exp.algorithms.capo import shift_bounds
from capo_exp.algorithms.down_weight import to_bounds
from capo_exp.core.types import Selection, TokenShifts
from tests.test_curvature import random_tokens
from tests.test_selection import score

SHIFTS = st.floats(0, 1e3)


def scored(policy, objective):
    """One completion with these shifts."""
    shape = (1, len(policy))
    whole = score(random_tokens(*shape, 30, 8, 5), torch.ones(shape, dtype=torch.bool))
    return replace(whole, shifts=TokenShifts(torch.tensor([policy]), torch.tensor([objective])))


def weights(policy, objective, policy_max, objective_max):
    chosen = to_bounds(
        scored(policy, objective), policy_shift_max=policy_max, objective_shift_max=objective_max
    )
    assert chosen.keep_mask.all() and not chosen.rejected_by
    return chosen.weights[0].tolist()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SHIFTS, st.floats(-1e3, 1e3)), min_size=1, max_size=6))
def test_a_weighed_update_is_within_the_bounds_and_as_large_as_they_allow(tokens):
    policy, objective = [p for p, _ in tokens], [o for _, o in tokens]
    for w, p, o in zip(weights(policy, objective, 1e-2, 1e-1), policy, objective, strict=True):
        assert 0 < w <= 1
        assert w**2 * p <= 1e-2 * (1 + 1e-4) and w * abs(o) <= 1e-1 * (1 + 1e-4)
        assert w == 1 or math.isclose(max(w**2 * p / 1e-2, w * abs(o) / 1e-1), 1, rel_tol=1e-4)


def test_what_is_within_capos_bounds_counts_whole():
    some = scored([1e-5, 9e-5, 2e-4], [0.0, 5e-3, 5e-3])
    kept = shift_bounds(some, policy_shift_max=1e-4, objective_shift_min=-1e-2, objective_shift_max=1e-2)
    by_weight = to_bounds(some, policy_shift_max=1e-4, objective_shift_max=1e-2)
    assert (kept.keep_mask == (by_weight.weights == 1)).all()
    assert kept.keep_mask.tolist() == [[True, True, False]]


def test_shifts_that_are_not_finite_count_nothing_and_infinite_bounds_change_nothing():
    for policy, objective in ((math.nan, 0.0), (0.0, math.nan), (0.0, -math.inf)):
        assert weights([policy], [objective], 1.0, 1.0) == [0.0]
    assert weights([1e9, 1e-9], [-1e9, 0.0], math.inf, math.inf) == [1.0, 1.0]


def test_rows_take_their_weights_along(random_batch):
    whole = Selection(torch.ones(3, 4, dtype=torch.bool), weights=torch.arange(12.0).view(3, 4) / 12)
    part = whole.of_rows(torch.tensor([2, 0]), random_batch(rows=2, length=3))
    assert torch.equal(part.weights, whole.weights[[2, 0], :3])
    values = torch.ones(2, 3)
    assert torch.equal(part.weighed(values), part.weights)
    assert torch.equal(Selection(whole.keep_mask).weighed(values), values)
