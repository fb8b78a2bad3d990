"""Advantages, losses, selections and aggregations: by hand, by independent reference, by property."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capo_exp.aggregation import constant_length_mean, sequence_mean, token_mean
from capo_exp.algorithm import full_step, keep_all, kl_k3
from capo_exp.algorithms.capo import shift_bounds
from capo_exp.algorithms.dr_grpo import group_centred
from capo_exp.algorithms.grpo import clipped_surrogate, group_normalised
from capo_exp.algorithms.reinforce import raw_reward
from capo_exp.masked import masked_max, masked_mean, masked_quantile
from capo_exp.types import Batch, BatchShifts, BatchTotals, TokenShifts

INF = float("inf")
ADVANTAGES = [lambda r: group_normalised(r, eps=1e-4), group_centred]
rewards = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


def test_group_normalised_by_hand() -> None:
    # mean 1/4; deviations 3/4, -1/4 x3; unbiased variance (9 + 3) / 16 / 3 = 1/4, std 1/2
    got = group_normalised(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))


def test_reinforce_has_no_baseline() -> None:
    given_rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert torch.equal(raw_reward(given_rewards), given_rewards)


@settings(deadline=None)
@given(rewards, st.sampled_from(ADVANTAGES))
def test_group_advantages_are_centred_and_finite(
    values: list[list[float]], advantage: Callable[[Tensor], Tensor]
) -> None:
    got = advantage(torch.tensor(values))
    assert got.isfinite().all()
    torch.testing.assert_close(
        got.sum(1), torch.zeros(len(values)), atol=2e-3 * max(1.0, got.abs().max()), rtol=0
    )


@settings(deadline=None)
@given(st.floats(-5, 5, width=32), st.integers(2, 9), st.sampled_from(ADVANTAGES))
def test_equal_rewards_are_exactly_no_advantage(
    value: float, group: int, advantage: Callable[[Tensor], Tensor]
) -> None:
    assert not advantage(torch.full((3, group), value)).any()


def test_surrogate_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    log_probs = torch.randn(3, 4, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    loss = clipped_surrogate(log_probs, log_probs.detach(), advantages, clip_eps_low=0.2, clip_eps_high=0.2)
    loss.values.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages[:, None].expand(3, 4))
    assert not loss.clipped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.4, 1.0, -1.3, 0.0),  # above 1 + 0.3 with A > 0: clipped
        (0.5, 1.0, -0.5, -0.5),  # below with A > 0: free to come back
        (0.5, -1.0, 0.8, 0.0),  # below 1 - 0.2 with A < 0: clipped
        (1.4, -1.0, 1.4, 1.4),  # above with A < 0: free to come back
        (1.25, 1.0, -1.25, -1.25),  # inside, but it would be outside 1 + 0.2
    ],
)
def test_surrogate_quadrants(ratio: float, advantage: float, value: float, gradient: float) -> None:
    log_probs = torch.tensor([[ratio]]).log().requires_grad_()
    loss = clipped_surrogate(
        log_probs, torch.zeros(1, 1), torch.tensor([advantage]), clip_eps_low=0.2, clip_eps_high=0.3
    )
    loss.values.sum().backward()
    assert loss.values.item() == pytest.approx(value)
    assert log_probs.grad is not None and log_probs.grad.item() == pytest.approx(gradient)
    assert loss.clipped.item() == (gradient == 0.0)


def test_kl_k3_is_unbiased_and_never_negative() -> None:
    """Over all actions, E_pi[k3] = KL(pi || ref) exactly."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    estimate = kl_k3(policy, reference)
    assert (estimate >= 0).all()
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    torch.testing.assert_close((policy.exp() * estimate).sum(), exact)


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
KEEP = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()
VALUES = torch.tensor([[1.0, 20.0, 3.0, 40.0], [50.0, 6.0, 700.0, 800.0]])
TOTALS = BatchTotals(sequences=2, completion_tokens=6)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (sequence_mean, ((1 + 3) / 2 + 6) / 2),
        (lambda *args: constant_length_mean(*args, length=10), (1 + 3 + 6) / 10 / 2),
        (token_mean, (1 + 3 + 6) / 6),
    ],
)
def test_aggregations_by_hand_and_rejected_tokens_have_no_gradient(
    aggregate: Callable[..., Tensor], expected: float
) -> None:
    values = VALUES.clone().requires_grad_()
    loss = aggregate(values, KEEP, MASK, TOTALS)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert values.grad is not None
    assert torch.equal(values.grad != 0, KEEP)
    values.grad = None
    nothing = aggregate(values, torch.zeros_like(KEEP), MASK, TOTALS)
    nothing.backward()
    assert nothing.item() == 0 and not values.grad.any()
    halves = [aggregate(values[i : i + 1], KEEP[i : i + 1], MASK[i : i + 1], TOTALS) for i in range(2)]
    torch.testing.assert_close(sum(halves), loss)


def shifted(random_batch: Callable[..., Batch]) -> tuple[Batch, TokenShifts]:
    batch = random_batch()
    shape = batch.completion_mask.shape
    generator = torch.Generator().manual_seed(0)
    policy = torch.rand(shape, generator=generator)
    return batch, TokenShifts(policy, torch.rand(shape, generator=generator) - 0.5)


def test_shift_bounds_are_strict_and_name_the_reason(random_batch: Callable[..., Batch]) -> None:
    batch, shifts = shifted(random_batch)
    bounds = {"policy_shift_max": 0.5, "objective_shift_min": -0.25, "objective_shift_max": 0.25}
    got = shift_bounds(shifts, batch, shifts.policy_shift, **bounds)
    mask = batch.completion_mask
    assert torch.equal(got.rejected_by["policy"], mask & (shifts.policy_shift >= 0.5))
    assert torch.equal(got.rejected_by["objective"], mask & (shifts.objective_shift.abs() >= 0.25))
    rejected = got.rejected_by["policy"] | got.rejected_by["objective"]
    assert torch.equal(got.keep_mask, mask & ~rejected) and 0 < got.keep_mask.sum() < mask.sum()
    assert int(got.keep_mask.sum() + rejected.sum()) == int(mask.sum())
    edge = TokenShifts(torch.full_like(shifts.policy_shift, 0.5), torch.zeros_like(shifts.policy_shift))
    assert not shift_bounds(edge, batch, edge.policy_shift, **bounds).keep_mask.any()


def test_infinite_bounds_keep_all_and_nan_is_rejected(random_batch: Callable[..., Batch]) -> None:
    batch, shifts = shifted(random_batch)
    off = {"policy_shift_max": INF, "objective_shift_min": -INF, "objective_shift_max": INF}
    got = shift_bounds(shifts, batch, shifts.policy_shift, **off)
    assert torch.equal(got.keep_mask, keep_all(shifts, batch, shifts.policy_shift).keep_mask)
    shifts.policy_shift[0, 0] = float("nan")
    assert not shift_bounds(shifts, batch, shifts.policy_shift, **off).keep_mask[0, 0]


def test_full_step_takes_all() -> None:
    assert full_step(BatchShifts(1.0, -1.0), 1e-3) == 1.0


def test_masked_reductions_ignore_what_is_masked() -> None:
    values = torch.tensor([[1.0, float("nan"), 5.0], [2.0, float("inf"), 4.0]])
    mask = torch.tensor([[True, False, True], [True, False, True]])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, 1).tolist() == [3.0, 3.0]
    assert masked_max(values, mask).item() == 5.0
    assert [masked_quantile(values, mask, q).item() for q in (0.25, 0.5, 0.75, 0.99)] == [1.0, 2.0, 4.0, 5.0]
    nothing = torch.zeros_like(mask)
    assert (
        masked_mean(values, nothing)
        == masked_max(values, nothing)
        == masked_quantile(values, nothing, 0.5)
        == 0
    )
