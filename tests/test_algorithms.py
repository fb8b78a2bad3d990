"""What all algorithms share: advantages, the surrogate, KL estimators, aggregations, neutral parts."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import capo_exp.algorithms
from capo_exp.algorithms.aggregation import (
    constant_length_mean,
    prompt_token_mean,
    sequence_mean,
    sequence_mean_over_all,
    token_mean,
    token_mean_over_kept,
)
from capo_exp.algorithms.cpgd import clip_filter_weighted
from capo_exp.algorithms.dash import prompt_mean
from capo_exp.algorithms.dr_grpo import group_centred
from capo_exp.algorithms.grpo import first_of_group, group_normalised
from capo_exp.algorithms.kl import kl_k1, kl_k2, kl_k3
from capo_exp.algorithms.maxrl import mean_normalised
from capo_exp.algorithms.neutral import all_completions, all_groups, every_token, full_step, unshaped
from capo_exp.algorithms.reinforce import raw_reward
from capo_exp.algorithms.rloo import leave_one_out
from capo_exp.config.declare import declares
from capo_exp.core.batch import totals
from capo_exp.core.masked import masked_max, masked_mean, masked_quantile
from capo_exp.core.step import StepDecision
from capo_exp.core.types import Batch
from capo_exp.curvature.step_trial import ModelStepTrial

CENTRED: dict[str, Callable[[Tensor], Tensor]] = {
    "group_normalised": lambda r: group_normalised(r, eps=1e-4, target_std=1.0),
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "clip_filter_weighted": lambda r: clip_filter_weighted(r, max_weight=3.0),
    "mean_normalised": mean_normalised,
}
rewards = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("eps", "target_std", "first"), [(0.0, 1.0, 1.5), (0.0, 0.75, 2.0), (0.25, 1.0, 1.0)]
)
def test_group_normalised_by_hand(eps, target_std, first):
    # mean 1/4; deviations 3/4, -1/4 x3; unbiased variance (9 + 3) / 16 / 3 = 1/4, std 1/2;
    # 3/4 / (1/2 * target + eps)
    got = group_normalised(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=eps, target_std=target_std)
    torch.testing.assert_close(got, torch.tensor([[first, *[-first / 3] * 3]]))


@settings(deadline=None, max_examples=40)
@given(rewards, st.sampled_from(sorted(CENTRED)))
def test_group_advantages_are_centred_and_finite(values, name):
    got = CENTRED[name](torch.tensor(values))
    assert got.isfinite().all()
    torch.testing.assert_close(
        got.sum(1), torch.zeros(len(values)), atol=2e-3 * max(1.0, got.abs().max()), rtol=0
    )


@settings(deadline=None, max_examples=40)
@given(st.floats(-5, 5, width=32), st.integers(2, 9), st.sampled_from([*sorted(CENTRED), "first_of_group"]))
def test_equal_rewards_are_exactly_no_advantage(value, group, name):
    every = CENTRED | {"first_of_group": lambda r: first_of_group(r, eps=1e-4)}
    assert not every[name](torch.full((3, group), value)).any()


def two_policies():
    """Logits [7] of a policy, with a gradient, and log-probs [7] of a reference."""
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 7, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(0)


def exact_kl(one, other):
    """KL(one || other) of log-probs [7]."""
    return torch.nn.functional.kl_div(other, one, log_target=True, reduction="sum")


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator):
    """Over all actions, E_pi[k] = KL(pi || ref) exactly."""
    logits, reference = two_policies()
    policy = logits.detach().log_softmax(0)
    estimate = estimator(policy, reference)
    torch.testing.assert_close((policy.exp() * estimate).sum(), exact_kl(policy, reference))
    if estimator is kl_k3:
        assert (estimate > 0).all() and not kl_k3(reference, reference).any()


def test_gradients_of_the_kl_estimators_in_expectation():
    """The sample comes from the policy and is not differentiated, so grad E = E_pi[grad k(ln pi)].

    k1: E[grad ln pi] = 0.  k2: E[ln(pi/ref) grad ln pi] = grad KL(pi || ref).
    k3: E[(1 - ref/pi) grad ln pi] = -E_ref[grad ln pi] = grad KL(ref || pi).
    """
    logits, reference = two_policies()

    def expected(estimator):
        policy = logits.log_softmax(0)
        return torch.autograd.grad((policy.detach().exp() * estimator(policy, reference)).sum(), logits)[0]

    forward, backward = (
        torch.autograd.grad(kl, logits)[0]
        for kl in (
            (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum(),
            (reference.exp() * (reference - logits.log_softmax(0))).sum(),
        )
    )
    torch.testing.assert_close(expected(kl_k1), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(expected(kl_k2), forward)
    torch.testing.assert_close(expected(kl_k3), backward)
    assert (forward - backward).norm() > 0.1
    assert kl_k2(torch.tensor([[-1.0]]), torch.tensor([[-4.0]])).item() == 4.5  # 1/2 (-1 + 4)^2


# Rows 0 and 1 answer prompt 0 with 4 and 2 tokens, row 2 prompt 1 with 3.
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
KEEP = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]).bool()
VALUES = torch.tensor([[1.0, 20.0, 3.0, 40.0], [50.0, 6.0, 700.0, 800.0], [2.0, 5.0, 60.0, 900.0]])
BATCH = Batch(
    input_ids=torch.zeros(3, 5).long(),
    attention_mask=torch.ones(3, 5).long(),
    completion_mask=MASK,
    sampler_log_probs=torch.zeros(3, 4),
    advantages=torch.zeros(3, 4),
    group_ids=torch.tensor([0, 0, 1]),
    truncated=torch.zeros(3).bool(),
    surprisal=torch.zeros(3),
)
TOTALS = replace(totals(BATCH), kept_tokens=int(KEEP.sum()))


def row_of(batch, row):
    return Batch(*(tensor[row : row + 1] for tensor in vars(batch).values()))


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (sequence_mean, ((1 + 3) / 2 + 6 + (2 + 5) / 2) / 3),
        (sequence_mean_over_all, ((1 + 3) / 4 + 6 / 2 + (2 + 5) / 3) / 3),
        (lambda *args: constant_length_mean(*args, length=10), (1 + 3 + 6 + 2 + 5) / 10 / 3),
        (token_mean, (1 + 3 + 6 + 2 + 5) / 9),
        (token_mean_over_kept, (1 + 3 + 6 + 2 + 5) / 5),
        (prompt_token_mean, ((1 + 3 + 6) / 6 + (2 + 5) / 3) / 2),
        (lambda *args: prompt_mean(*args, length=10), ((1 + 3 + 6) / 10 / 2 + (2 + 5) / 10) / 2),
    ],
)
def test_aggregations_by_hand_and_rejected_tokens_have_no_gradient(aggregate, expected):
    values = VALUES.clone().requires_grad_()
    loss = aggregate(values, KEEP, BATCH, TOTALS)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert values.grad is not None
    assert torch.equal(values.grad != 0, KEEP)
    values.grad = None
    nothing = aggregate(values, torch.zeros_like(KEEP), BATCH, replace(TOTALS, kept_tokens=0))
    nothing.backward()
    assert nothing.item() == 0 and not values.grad.any()
    parts = [aggregate(values[i : i + 1], KEEP[i : i + 1], row_of(BATCH, i), TOTALS) for i in range(3)]
    torch.testing.assert_close(sum(parts), loss)


def test_totals_count_the_tokens_of_each_prompt():
    assert (TOTALS.sequences, TOTALS.completion_tokens, TOTALS.group_tokens.tolist()) == (3, 9, [6, 3])
    lonely = totals(
        row_of(BATCH, 2)
    )  # after a filter: prompt 0 has no rows left and is no prompt of the mean
    assert lonely.group_tokens.tolist() == [0, 3] and lonely.group_sequences.tolist() == [0, 1]
    loss = prompt_token_mean(VALUES[2:], MASK[2:], row_of(BATCH, 2), lonely)
    assert loss.item() == pytest.approx((2 + 5 + 60) / 3)


def test_neutral_parts_do_nothing(random_batch):
    given_rewards, noise = torch.rand(3, 4), torch.rand(3, 4)
    assert torch.equal(raw_reward(given_rewards), given_rewards)  # REINFORCE has no baseline
    assert all_groups(torch.zeros(3, 4)).tolist() == [True] * 3
    assert torch.equal(unshaped(given_rewards, noise, noise), given_rewards)
    credit = every_token(torch.tensor([1.0, -2.0, 3.0]), MASK, torch.rand(3, 4))
    assert credit.tolist() == [[1.0] * 4, [-2.0, -2.0, 0.0, 0.0], [3.0, 3.0, 3.0, 0.0]]
    assert all_completions(random_batch()).tolist() == [True] * 8
    untouchable = object.__new__(ModelStepTrial)  # any look at it would fail
    assert full_step(untouchable) == StepDecision(1.0)


def test_masked_reductions_ignore_what_is_masked():
    values = torch.tensor([[1.0, float("nan"), 5.0], [2.0, float("inf"), 4.0]])
    mask = torch.tensor([[True, False, True], [True, False, True]])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, 1).tolist() == [3.0, 3.0]
    assert masked_max(values, mask).item() == 5.0
    assert [masked_quantile(values, mask, q).item() for q in (0.25, 0.5, 0.75, 0.99)] == [1.0, 2.0, 4.0, 5.0]
    hundred = torch.arange(1.0, 101.0)
    assert [masked_quantile(hundred, hundred > 0, q).item() for q in (0.07, 0.55)] == [7.0, 55.0]
    nothing = torch.zeros_like(mask)
    assert (
        masked_mean(values, nothing)
        == masked_max(values, nothing)
        == masked_quantile(values, nothing, 0.5)
        == 0
    )


PART_FILES = sorted(path.stem for path in Path(capo_exp.algorithms.__path__[0]).glob("[a-z]*.py"))
NOT_PARTS = ("protocols", "kinds", "surrogates", "kl")


def parts():
    """Every public function of a module that holds parts."""
    found: dict[str, Callable[..., object]] = {}
    for stem in (name for name in PART_FILES if name not in NOT_PARTS):
        module = import_module(f"capo_exp.algorithms.{stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                found[f"{stem}.{name}"] = function
    return found


def test_parts_declare_what_they_need():
    """Those that compare a group, and no other; the KL in a reward goes by the number that a part names."""
    compares = {name.partition(".")[2] for name, f in parts().items() if declares(f, "compares_group")}
    losses = {"preference", "simpo", "relative_regression", "lagrangian"}
    assert compares == {*CENTRED, "batch_normalised", "first_of_group", *losses}
    kl = {name: number for name, f in parts().items() if (number := declares(f, "needs_kl"))}
    assert kl == dict.fromkeys(("rloo.kl_in_reward", "reinforce_pp.whitened_return"), "kl_coefficient")
