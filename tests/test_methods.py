"""What defines each method, by its paper's formulas; built from conf/algo, so that its numbers count."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_exp.algorithms.cpgd import clip_filter_weighted, policy_drift_surrogate, reweighted
from capo_exp.algorithms.dapo import overlong_penalty
from capo_exp.algorithms.grpo import first_of_group
from capo_exp.algorithms.kl import kl_k1, kl_k2, kl_k3
from capo_exp.algorithms.reinforce_pp import whitened_return
from capo_exp.algorithms.rloo import leave_one_out
from capo_exp.core.batch import totals
from capo_exp.runs.checkpoint import Checkpointer, find_reference
from capo_exp.training.learner import Learner
from capo_exp.training.rollout_step import Rollout, assign_credit
from tests.pieces import (
    NO_TOKENIZER,
    gradients,
    groups_of,
    inputs_of,
    plain_log_probs,
    run_updates,
    same_weights,
    take_step,
    watch_gradients,
    weights,
    with_step,
)


def one_token(loss, ratio, advantage):
    """Value, gradient with respect to ln pi, and `clipped` of a completion of one token; ln pi is 0."""
    log_probs = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    old, mask = -torch.tensor([[ratio]], dtype=torch.float64).log(), torch.ones(1, 1).bool()
    got = loss(inputs_of(log_probs, old, torch.tensor([[advantage]], dtype=torch.float64), mask))
    (gradient,) = torch.autograd.grad(got.values.sum(), log_probs)
    return got.values.item(), gradient.item(), bool(got.clipped.item())


def off_policy(batch, spread):
    """log_probs with a gradient, old_log_probs, advantages, all [B, T] float64; log-ratios of this spread."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch.completion_mask.shape, generator=generator, dtype=torch.float64)
    old = torch.rand(noise.shape, generator=generator, dtype=torch.float64).log() * batch.completion_mask
    log_probs = old + spread * noise * batch.completion_mask
    return log_probs.requires_grad_(), old, batch.advantages.double()


def loss_and_gradient(algorithm, batch, spread, keep_mask=None):
    """Loss, gradient [B, T] with respect to log_probs, `clipped` [B, T] of an algorithm's two parts."""
    log_probs, old, advantages = off_policy(batch, spread)
    inputs = with_step(inputs_of(log_probs, old, advantages, batch.completion_mask), batch.group_ids)
    token_loss = algorithm.token_loss(inputs)
    keep = batch.completion_mask if keep_mask is None else keep_mask
    loss = algorithm.aggregation(token_loss.values, keep, batch, totals(batch))
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0], token_loss.clipped


@settings(deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda g: st.lists(
            st.lists(st.floats(-5, 5, width=32), min_size=g, max_size=g), min_size=1, max_size=4
        )
    )
)
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(values):
    rewards = torch.tensor(values)
    size = rewards.shape[1]
    others = [[(sum(row) - row[i]) / (size - 1) for i in range(size)] for row in rewards.tolist()]
    got = leave_one_out(rewards)
    torch.testing.assert_close(got, rewards - torch.tensor(others), rtol=1e-4, atol=1e-4)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(got, size / (size - 1) * centred, rtol=1e-4, atol=1e-4)


def plain_sequence_gradient(batch, spread, *, mean, low, high):
    """Value and gradient of mean_i -min(s_i A_i, clip(s_i) A_i), written plainly; which rows are clipped."""
    log_probs, old, advantages = off_policy(batch, spread)
    log_ratio = ((log_probs - old) * batch.completion_mask).sum(1)
    ratio = (log_ratio / batch.completion_mask.sum(1) if mean else log_ratio).exp()
    advantage = advantages[:, 0]
    unclipped, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    loss = -torch.minimum(unclipped, clipped).mean()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0], clipped < unclipped


@pytest.mark.parametrize(
    ("name", "spread", "mean", "low", "high"),
    [
        ("rloo", 0.15, False, 0.2, 0.2),
        ("gspo", 1e-3, True, 3e-4, 4e-4),
        ("luspo", 5e-3, True, 2e-3, 2.5e-3),
    ],
)
def test_a_ratio_of_the_completion_is_clipped_whole(built, random_batch, name, spread, mean, low, high):
    """Value and gradient are those of -min(s A, clip(s) A); LUSPO's are times the length."""
    batch = random_batch(rows=32)
    mask = batch.completion_mask
    loss, gradient, clipped = loss_and_gradient(built(name), batch, spread)
    wanted, expected, rows = plain_sequence_gradient(batch, spread, mean=mean, low=low, high=high)
    if name == "luspo":
        expected = expected * mask.sum(1, keepdim=True)
    else:
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected)
    assert 0 < rows.sum() < 32 and not gradient[rows].any()
    assert torch.equal(clipped & mask, rows[:, None] & mask)  # all of a completion's tokens or none


def test_a_completion_far_from_where_it_was_sampled_has_finite_gradients(built):
    """e^90 is more than a float32: where the clip ends the gain the gradient is 0, not 0 times infinity."""
    old, mask = torch.full((1, 1000), -1.0), torch.ones(1, 1000).bool()
    for sign in (1.0, -1.0):
        log_probs = (old + 0.09).requires_grad_()
        loss = built("rloo").token_loss(inputs_of(log_probs, old, sign * mask.float(), mask))
        (gradient,) = torch.autograd.grad(loss.values.sum(), log_probs)
        assert loss.values.isfinite().all() and gradient.isfinite().all()
        assert gradient.any().item() is (sign < 0)


@pytest.mark.parametrize("name", ["gspo", "rloo"])
def test_a_dropped_token_still_counts_in_the_ratio_but_has_no_gradient(built, random_batch, name):
    """The others' gradients are those of the sequence ratio over all tokens: s does not see the selection."""
    batch, algorithm = (
        random_batch(),
        built(name, "algo.token_loss.clip_eps_low=1.0", "algo.token_loss.clip_eps_high=inf"),
    )
    mask = batch.completion_mask
    keep = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    _, whole, _ = loss_and_gradient(algorithm, batch, 0.1)
    _, gradient, _ = loss_and_gradient(algorithm, batch, 0.1, keep)
    assert torch.equal(gradient != 0, keep)
    weight = mask.sum(1) / keep.sum(1).clamp(min=1) if name == "gspo" else torch.ones(8)  # sequence_mean
    torch.testing.assert_close(gradient, whole * keep * weight[:, None])


@pytest.mark.parametrize(
    ("name", "old", "new", "advantage", "free"),
    [
        ("dppo", 0.001, 0.1, 1.0, True),  # a ratio of 100, and little moved
        ("dppo", 0.5, 0.64, 1.0, True),
        ("dppo", 0.5, 0.66, 1.0, False),
        ("dppo", 0.5, 0.34, 1.0, True),  # away, but against A
        ("dppo", 0.5, 0.34, -1.0, False),
        ("dppo", 0.5, 0.66, -1.0, True),
        ("dppo_kl", 0.5, 0.65, 1.0, True),  # .5 ln(.25 / (.65 * .35)) = .0472
        ("dppo_kl", 0.5, 0.66, 1.0, False),  # .0541
        ("dppo_kl", 0.01, 0.11, 1.0, False),  # .0815, and in total variation only .1
        ("dppo_kl", 0.5, 0.34, -1.0, False),
        ("dppo_kl", 1.0, 1.0, 1.0, True),
        ("dppo_kl", 0.9995, 1.0, 1.0, True),  # 1 is what float32 shows of what is near it
    ],
)
def test_dppo_masks_by_probability(built, name, old, new, advantage, free):
    log_probs = torch.tensor([[new]]).double().log().requires_grad_()
    before, credit = torch.tensor([[old]]).double().log(), torch.tensor([[advantage]]).double()
    got = built(name).token_loss(inputs_of(log_probs, before, credit, torch.ones(1, 1).bool()))
    (gradient,) = torch.autograd.grad(got.values.sum(), log_probs)
    capped = min(new / old, 20.0)
    assert got.values.item() == pytest.approx(-capped * advantage)
    assert gradient.item() == pytest.approx(-capped * advantage if free else 0.0)
    assert got.clipped.item() != free


def test_dppo_at_the_sampler_takes_mask_and_ratio_from_it(built):
    """Policies .5, sampler .3: |.5 - .3| > .15 along A > 0, ratio 5 / 3; unsampled: the old policy's."""
    half, mask = torch.full((1, 2), 0.5).double().log(), torch.ones(1, 2).bool()
    sampler = torch.tensor([[0.3, float("nan")]]).double().log()
    for sign, kept in ((1.0, [False, True]), (-1.0, [True, True])):
        log_probs = half.clone().requires_grad_()
        inputs = replace(inputs_of(log_probs, half, sign * mask.double(), mask), sampler_log_probs=sampler)
        got = built("dppo").token_loss(inputs)
        (gradient,) = torch.autograd.grad(got.values.sum(), log_probs)
        ratios = torch.tensor([[5 / 3, 1.0]]).double()
        torch.testing.assert_close(got.values.detach(), -sign * ratios)
        torch.testing.assert_close(gradient, -sign * ratios * torch.tensor([kept]))
        old = built("dppo", "algo.token_loss.sampler_share=0.0").token_loss(inputs)
        assert torch.equal(old.values, -sign * mask.double()) and not old.clipped.any()


def test_dppo_has_a_bound_for_each_sign_of_an_advantage(built, random_batch):
    log_probs, old, advantages = off_policy(batch := random_batch(), 1.0)
    one_sided = built("dppo", "algo.token_loss.token_loss.delta_high=inf")
    left = one_sided.token_loss(inputs_of(log_probs, old, advantages, batch.completion_mask)).clipped
    assert left[advantages < 0].any() and not left[advantages >= 0].any()


def test_returns_to_go_by_hand():
    """Completion 0: R = 1, coefficient * kl = .05, .1, .15, so returns 1 - .3, 1 - .25, 1 - .15; completion
    1: R = 0, one token that pays .2. Mean (.7 + .75 + .85 - .2) / 4 = .525."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    got = whitened_return(torch.tensor([1.0, 0.0]), mask, kl, kl_coefficient=0.5, eps=0.0)
    centred = torch.tensor([0.7, 0.75, 0.85, -0.2]) - 0.525
    torch.testing.assert_close(got[mask], centred / centred.square().mean().sqrt())
    assert not got[~mask].any()


def test_whitened_credit_has_mean_0_and_variance_1_whatever_the_padding(random_batch):
    mask = random_batch(rows=16).completion_mask
    generator = torch.Generator().manual_seed(0)
    advantages, kl = torch.randn(16, generator=generator), torch.randn(mask.shape, generator=generator)
    got = whitened_return(advantages, mask, kl * mask, kl_coefficient=0.1, eps=1e-8)
    assert got[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert got[mask].var(correction=0).item() == pytest.approx(1, rel=1e-5)
    noisy = torch.where(mask, kl, torch.full_like(kl, 1e6))  # a number on padding must not count
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (mask, noisy)]
    torch.testing.assert_close(whitened_return(advantages, *wide, kl_coefficient=0.1, eps=1e-8)[:, :7], got)


@settings(deadline=None)
@given(st.floats(-5, 5, width=32), st.integers(1, 9))
def test_equal_returns_are_exactly_no_credit(value, rows):
    mask = torch.ones(rows, 3).bool()
    advantages = torch.full((rows,), value)
    assert not whitened_return(advantages, mask, torch.zeros(rows, 3), kl_coefficient=0.0, eps=1e-8).any()


def some_rollout():
    """3 prompts with 4 completions each, of different lengths."""
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    lengths = [[3, 1, 4, 2], [5, 2, 2, 1], [1, 3, 2, 4]]
    groups = groups_of(rewards, lengths)
    return Rollout(groups, torch.tensor(rewards), True, len(groups), 12, 30, {})


def drawn_batch(ours):
    """The credited batch of some_rollout, ln(policy / reference) [B, T], and rewards [P, G]."""
    rollout = some_rollout()
    batch, _ = assign_credit(rollout, ours, pad_token_id=0)
    if ours.reference is None:
        return batch, torch.zeros_like(batch.advantages), rollout.rewards
    with torch.no_grad():
        kl = plain_log_probs(ours.model, batch) - plain_log_probs(ours.reference, batch)
    return batch, kl, rollout.rewards


def whiten(values, mask):
    kept = values[mask]
    return (values - kept.mean()) / kept.std(correction=0) * mask


def return_to_go(rewards, kl, mask):
    to_go = torch.stack([kl[:, t:].sum(1) for t in range(kl.shape[1])], 1)
    return whiten(rewards.view(-1, 1) - 0.5 * to_go, mask)


def centred(rewards, kl, mask):
    return whiten((rewards - rewards.mean(1, keepdim=True)).view(-1, 1).expand_as(kl), mask)


def against_the_others(rewards, kl, mask):
    shaped = rewards - 0.5 * kl.sum(1).view(3, 4)
    return (shaped - (shaped.sum(1, keepdim=True) - shaped) / 3).view(-1, 1) * mask


@pytest.mark.parametrize(
    ("overrides", "formula"),
    [
        (["algo=reinforce_pp", "algo.credit.kl_coefficient=0.5"], return_to_go),
        (["algo=reinforce_pp_baseline"], centred),
        (["algo=rloo", "algo.shaping.kl_coefficient=0.5"], against_the_others),
    ],
)
def test_the_credit_is_that_of_rewards_and_the_kl_to_the_reference(learner, overrides, formula):
    batch, kl, rewards = drawn_batch(learner(*overrides, distance=0.1))
    expected = formula(rewards, kl, batch.completion_mask)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-5)
    assert kl.abs().max() > 0.1


def test_dapo_with_grpos_bounds_and_mean_is_grpo_bit_for_bit(learner, random_batch):
    shared = ["algo.num_iterations=3", "regime.learning_rate=1e-2"]
    mean = "algo.aggregation._target_=capo_exp.algorithms.aggregation.sequence_mean"
    grpo, dapo, other = (
        learner(*given, *shared)
        for given in (["algo=grpo"], ["algo=dapo", "algo.token_loss.clip_eps_high=0.2", mean], ["algo=dapo"])
    )
    for one in (grpo, dapo, other):
        metrics, _ = run_updates(one, random_batch())
        assert metrics[-1]["loss/clip_fraction"] > 0
    assert same_weights(grpo, dapo) and not same_weights(grpo, other)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0), (1.25, 1.0, -1.25, -1.25), (1.29, 1.0, -1.28, 0.0), (0.7, 1.0, -0.7, -0.7),
        (0.81, -1.0, 0.81, 0.81), (0.79, -1.0, 0.8, 0.0), (1.5, -1.0, 1.5, 1.5),
    ],
)  # fmt: skip
def test_clip_higher_quadrants(built, ratio, advantage, value, gradient):
    """0.2 below, 0.28 above."""
    got = one_token(built("dapo").token_loss, ratio, advantage)
    assert got == (pytest.approx(value), pytest.approx(gradient), gradient == 0)


def test_the_overlong_penalty_is_piecewise_linear():
    # Lmax 20, cache 5: 0 up to 15 tokens, ((20 - 5) - n) / 5 in between, -1 from 20 on
    lengths = torch.tensor([[0.0, 15.0, 16.0, 17.0, 19.0, 20.0, 21.0, 99.0]])
    got = overlong_penalty(torch.ones(1, 8), lengths, torch.zeros(1, 8), max_length=20, cache=5)
    torch.testing.assert_close(got - 1, torch.tensor([[0.0, 0.0, -0.2, -0.4, -0.8, -1.0, -1.0, -1.0]]))


def test_dapo_punishes_before_it_normalises(learner):
    """A cache of 1 of 5 tokens: only the completion of 5 pays, and its group's advantages follow."""
    ours = learner("algo=dapo", "dataset.max_completion_tokens=5")
    batch, _, rewards = drawn_batch(ours)
    shaped = rewards - torch.tensor([[0.0] * 4, [1.0, 0, 0, 0], [0.0] * 4])
    expected = (shaped - shaped.mean(1, keepdim=True)) / (shaped.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.advantages, expected.view(-1, 1) * batch.completion_mask)


def test_overlong_filtering_drops_every_token_of_a_truncated_completion(learner, random_batch):
    ours, batch = learner("algo=dapo", "selection=drop_truncated"), random_batch()
    metrics, record = take_step(ours, batch)
    mask, cut = batch.completion_mask, batch.truncated
    assert 0 < cut.sum() < 8
    assert torch.equal(record.selection.keep_mask, mask & ~cut[:, None])
    assert metrics["selection/rejection_rate_truncated"] == pytest.approx(
        (mask[cut].sum() / mask.sum()).item()
    )


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_dual_clip_bounds_the_loss_of_wrong_completions_and_nothing_else(built, advantage):
    single, dual = (built(name).token_loss for name in ("grpo", "grpo_dual_clip"))
    for ratio in (0.1, 0.79, 0.9, 1.0, 1.3, 2.9, 3.1, 50.0):
        one, two = one_token(single, ratio, advantage), one_token(dual, ratio, advantage)
        if advantage < 0 and ratio > 3:
            assert two == (pytest.approx(3 * abs(advantage)), 0.0, True)
        else:
            assert two == one


def test_grpo_without_clip_is_the_plain_ratio(built, random_batch):
    batch, algorithm = random_batch(), built("grpo_no_clip")
    loss, gradient, clipped = loss_and_gradient(algorithm, batch, spread=2.0)
    log_probs, old, advantages = off_policy(batch, 2.0)
    mask = batch.completion_mask
    rows = ((log_probs - old).exp() * advantages).sum(1) / mask.sum(1)
    torch.testing.assert_close(loss, -rows.mean().detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(-rows.mean(), log_probs)[0])
    assert not clipped.any()


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 2.0])
def test_grpo_with_drift_adds_cpgds_drift(built, ratio, advantage):
    plain = one_token(built("grpo").token_loss, ratio, advantage)
    got = one_token(built("grpo_drift").token_loss, ratio, advantage)
    assert got[1] - plain[1] == pytest.approx(0.01 * min(ratio - 1, 0.2), abs=1e-12)
    assert got[2] == plain[2]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "free"),
    [(1.21, 1.0, -1.2, False), (0.5, 1.0, -0.5, True), (0.79, -1.0, 0.8, False), (3.0, -1.0, 3.0, True)],
)
def test_the_clip_acts_in_two_quadrants(built, ratio, advantage, value, free):
    """-A ln(r), held at -A ln(1.2) and -A ln(0.8) where the policy has gone far enough already."""
    got, gradient, clipped = one_token(built("cpg").token_loss, ratio, advantage)
    assert got == pytest.approx(-advantage * torch.tensor(abs(value)).double().log().item())
    assert (gradient, clipped) == (-advantage if free else 0.0, not free)


@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.0, 1.1, 1.19, 1.21, 3.0])
def test_the_drift_has_the_gradient_of_k3_and_a_limit(built, ratio):
    """k3 of KL(old || policy) = r - 1 - ln r; alpha = 0.01, and r - 1 counts as 0.2 at most."""
    log_probs = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    (k3,) = torch.autograd.grad(log_probs.exp() - 1 - log_probs, log_probs)
    got = one_token(built("cpgd").token_loss, ratio, 0.0)[1]
    assert got == pytest.approx(0.01 * k3.item() if ratio - 1 < 0.2 else 0.01 * 0.2, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "clipped", "drift"),
    [("cpgd", 0.0, 0.2), ("cpg", 0.0, 0.0), ("pgd", -1.0, 0.2), ("pg", -1.0, 0.0)],
)
def test_ablations_switch_off_clip_and_drift(built, name, clipped, drift):
    """A > 0 and r far above the bound: the clip removes -A, the drift adds 0.01 * 0.2. And far below it."""
    loss = built(name).token_loss
    assert one_token(loss, 9.0, 1.0)[1] == pytest.approx(clipped + 0.01 * drift)
    assert one_token(loss, 0.01, -1.0)[1] == pytest.approx(-clipped - 0.01 * 0.99 * (drift > 0))


def test_bounds_go_from_tight_to_loose_along_a_completion(built):
    """eps (1/4 + 3/4 i / n): .0875, .125, .1625, .2 of four tokens, .125, .2 of two; tightness 1: 0.2."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    bounds = torch.tensor([[0.0875, 0.125, 0.1625, 0.2], [0.125, 0.2, 0.0, 0.0]]).double()
    loose = built("cpg", "algo.token_loss.tightness=0.25").token_loss
    constant = built("cpg").token_loss
    for loss, limit in ((loose, bounds), (constant, torch.full_like(bounds, 0.2))):
        for sign in (1.0, -1.0):
            for factor, outside in ((0.99, False), (1.01, True)):
                log_ratio = (1 + sign * factor * limit).log() * mask
                zeros = torch.zeros_like(log_ratio)
                got = loss(inputs_of(log_ratio, zeros, sign * mask.double(), mask))
                assert torch.equal(got.clipped, mask & outside)


def test_clip_filter_weights_by_hand():
    """w = min(3, prompts / prompts with a signal), on R - mean = +-1/2."""
    mixed, equal = [1.0, 0.0], [1.0, 1.0]
    for prompts, weight in (
        ([mixed] * 4, 1.0),
        ([mixed, mixed, mixed, equal], 4 / 3),
        ([mixed, equal], 2.0),
        ([mixed] + [equal] * 8, 3.0),
    ):
        got = clip_filter_weighted(torch.tensor(prompts), max_weight=3.0)
        torch.testing.assert_close(got[0], weight * torch.tensor([0.5, -0.5]))
        assert not got[[row is equal for row in prompts]].any()
    assert not clip_filter_weighted(torch.tensor([equal] * 4), max_weight=3.0).any()


def test_cpgds_prompt_weights(built):
    """1 / std is GRPO's advantage; equal is Dr. GRPO's; unprocessed is the reward."""
    rewards = torch.rand(5, 4)
    got = {name: built(f"cpgd_{name}").advantage(rewards) for name in ("std", "equal", "unprocessed")}
    assert torch.equal(got["std"], built("grpo").advantage(rewards))
    torch.testing.assert_close(got["equal"], rewards - rewards.mean(1, keepdim=True))
    assert torch.equal(got["unprocessed"], rewards)
    losses = [built(f"cpgd_{name}").token_loss for name in got]
    assert len({one_token(loss, 0.5, -2.0) for loss in [built("cpgd").token_loss, *losses]}) == 1


@pytest.mark.parametrize(
    ("ratio", "weight"), [(1.0, 1.0), (1.04, 1.04), (1.15, 1.05), (0.97, 0.97), (0.85, 0.95)]
)
def test_inner_epochs_reweight_the_advantage(ratio, weight):
    """A clip(r, 1 - 0.05, 1 + 0.05) in place of A, not differentiated; the drift is not reweighted."""
    numbers = {
        "clip_eps_low": 0.2, "clip_eps_high": 0.2, "tightness": 1.0, "drift_coefficient": 0.5,
        "drift_max": 9.0,
    }  # fmt: skip

    plain = partial(policy_drift_surrogate, **numbers)
    loss = partial(reweighted, token_loss=plain, weight_eps=0.05)
    for advantage in (2.0, -2.0):
        _, gradient, _ = one_token(loss, ratio, advantage)
        assert gradient == pytest.approx(-advantage * weight + 0.5 * (ratio - 1))


def test_cpgd_averages_over_the_tokens_of_a_prompt_then_over_prompts(learner, small_model, random_batch):
    """At ratio 1: the gradient of -mean_x (1 / sum_k |y_k|) sum_k A_k sum_t ln pi; two rows a prompt."""
    batch = random_batch()
    got = gradients(learner("algo=cpgd", "model.micro_batch_size=3"), batch)
    model = copy.deepcopy(small_model)
    terms = (batch.advantages * plain_log_probs(model, batch)).sum(1).view(4, 2).sum(1)
    (-(terms / batch.completion_mask.sum(1).view(4, 2).sum(1)).mean()).backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)


def sparse(batch, *rows):
    """Only these rows have an advantage."""
    chosen = torch.zeros(len(batch.group_ids), 1)
    chosen[list(rows)] = 1.0
    return replace(batch, advantages=batch.advantages * chosen)


UNFILTERED = [
    "algo.completion_filter._target_=capo_exp.algorithms.neutral.all_completions",
    "~algo.completion_filter.threshold",
]
NO_KL = ["algo.kl_coefficient=0.0", "algo.completion_filter.threshold=0.0", "regime.learning_rate=1e-3"]


def last_gradient(ours, batch):
    """That of the last optimiser step of the updates of one batch."""
    seen = watch_gradients(ours)
    run_updates(ours, batch)
    return seen[-1]


def test_dropping_completions_without_advantage_is_neutral_over_all(learner, random_batch):
    """Denominator of all 8 and no KL: the same gradient as without the filter. Of the kept rows, as an
    average over the step: 8 / 4 of it, for the filter leaves 4: rows 1, 4, 6, and the first of the prompt
    that has no advantage."""
    batch = sparse(random_batch(), 1, 4, 6)
    plain = "algo.aggregation._target_=capo_exp.algorithms.aggregation.constant_length_mean"
    none, over_all, kept = (
        learner("algo=dash", *NO_KL, plain, *given)
        for given in (UNFILTERED, ["algo.filter_denominator=all"], ["algo.filter_denominator=kept"])
    )
    whole, same, more = (last_gradient(ours, batch) for ours in (none, over_all, kept))
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(over_all), weights(none), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(more, [8 / 4 * g for g in whole], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_dash_is_the_authors_average_of_filtered_micro_batches(learner, small_model, random_batch, kl):
    """The mean over what the filter leaves of each prompt, or its first completion; 2 of 4 have a signal."""
    batch = sparse(random_batch(), 1, 4, 5)
    ours = learner("algo=dash", f"algo.kl_coefficient={kl}", "model.micro_batch_size=3", distance=0.05)
    got = last_gradient(ours, batch)
    model, mask = copy.deepcopy(small_model), batch.completion_mask
    log_probs, total = plain_log_probs(model, batch), torch.zeros(())
    ref = log_probs if ours.reference is None else plain_log_probs(ours.reference, batch)
    values = (
        -batch.advantages * (log_probs - log_probs.detach()).exp()
        + kl * kl_k3(log_probs, ref.detach()) * mask
    )
    for rows in ([1], [2], [4, 5], [6]):
        total = total + values[rows].sum() / (96 * len(rows)) / 4
    total.backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.0, [1, 2, 5, 6]), (0.5, [1, 2, 4, 6]), (99.0, [0, 2, 4, 6])]
)
def test_the_learner_does_not_see_what_dash_filters(learner, random_batch, threshold, kept):
    """|A| > threshold strictly; of a prompt that keeps none, the first completion; the reference, too."""
    batch = random_batch()
    sizes = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, -0.5, -0.6, 0.0])
    batch = replace(batch, advantages=sizes[:, None] * batch.completion_mask)
    ours = learner("algo=dash", f"algo.completion_filter.threshold={threshold}")
    seen = {"model": 0, "reference": 0}
    assert ours.reference is not None
    for name, model in (("model", ours.model), ("reference", ours.reference)):

        def count(module, args, kwargs, name=name):
            seen[name] += len(kwargs["input_ids"])

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    metrics, record = run_updates(ours, batch)
    assert seen == {"model": len(kept), "reference": len(kept)}
    assert torch.equal(record.batch.input_ids, batch.input_ids[kept])
    assert metrics[0]["selection/filtered_completion_fraction"] == pytest.approx(1 - len(kept) / 8)


def test_sft_is_cross_entropy_on_the_correct_completions(learner, small_model, random_batch):
    """Mean over the tokens of rows 2, 3, 7, whatever the wrong ones are; without a right one: nothing."""
    correct, batch = [2, 3, 7], random_batch()
    right = torch.zeros(8, 1)
    right[correct] = 1.0
    batch = replace(batch, advantages=right * batch.completion_mask)
    sft = ("algo=sft", "model.micro_batch_size=2")
    got, model = last_gradient(learner(*sft), batch), copy.deepcopy(small_model)
    (-plain_log_probs(model, batch)[correct][batch.completion_mask[correct]].mean()).backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)
    noise = torch.where((right == 0) & (batch.input_ids > 0), 9, batch.input_ids)
    again = last_gradient(learner(*sft), replace(batch, input_ids=noise))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    idle = learner(*sft)
    assert not any(g.any() for g in last_gradient(idle, sparse(batch)))
    assert all(torch.equal(a, b) for a, b in zip(weights(idle), small_model.parameters(), strict=True))


def mean_of_rows(values, mask):
    return (values.sum(1) / mask.sum(1)).mean()


def mean_of_tokens(values, mask):
    return values.sum() / mask.sum()


ESTIMATOR = "algo.kl_estimator._target_=capo_exp.algorithms.kl"


@pytest.mark.parametrize(
    ("overrides", "estimator", "coefficient", "mean"),
    [
        (["algo=grpo_kl", f"{ESTIMATOR}.kl_k1"], kl_k1, 0.01, mean_of_rows),
        (["algo=grpo_kl", f"{ESTIMATOR}.kl_k2"], kl_k2, 0.01, mean_of_rows),
        (["algo=grpo_kl"], kl_k3, 0.01, mean_of_rows),
        (["algo=reinforce_pp_baseline"], kl_k2, 0.01, mean_of_tokens),
        (["algo=prorl"], kl_k3, 1e-4, mean_of_tokens),
        (["algo=dash"], kl_k3, 0.04, lambda values, mask: values.sum() / (96 * 8)),
    ],
)  # fmt: skip
def test_the_kl_in_the_loss_is_the_estimators(learner, random_batch, overrides, estimator, coefficient, mean):
    """Without advantages nothing else is in the loss; temperature 0.7 on both. loss/kl is always k3."""
    batch = sparse(random_batch())
    ours = learner(*overrides, "rollout.temperature=0.7", "model.micro_batch_size=3", distance=0.05)
    model, reference = copy.deepcopy(ours.model), ours.reference
    assert reference is not None
    seen = watch_gradients(ours)
    metrics, record = take_step(ours, batch)
    mask, ref = batch.completion_mask, plain_log_probs(reference, batch, 0.7)
    log_probs = plain_log_probs(model, batch, 0.7)
    loss = coefficient * mean(estimator(log_probs, ref) * mask, mask)
    loss.backward()
    assert metrics["loss/total"] == pytest.approx(loss.item(), rel=1e-3)
    torch.testing.assert_close(seen[0], [p.grad for p in model.parameters()], rtol=5e-3, atol=1e-6)
    assert metrics["loss/kl"] == pytest.approx(
        mean_of_tokens(kl_k3(log_probs, ref) * mask, mask).item(), rel=1e-3
    )
    assert metrics["loss/kl"] > 0.01 and record.kl[~mask].eq(0).all()


def test_a_kl_in_the_reward_alone_leaves_the_loss_finite_however_far_the_reference(learner, random_batch):
    """The k3 of RLOO's metric overflows; its loss has no KL term."""
    ours, plain = learner("algo=rloo"), learner("algo=rloo", "algo.shaping.kl_coefficient=0.0")
    assert ours.reference is not None and plain.reference is None
    for one in (ours, plain):
        with torch.no_grad():
            one.model.get_output_embeddings().weight.mul_(300.0)
    metrics = take_step(ours, random_batch())[0]
    assert metrics["loss/kl"] == float("inf")
    assert metrics["loss/total"] == take_step(plain, random_batch())[0]["loss/total"] and same_weights(
        ours, plain
    )


def test_a_reset_reference_is_the_policy(learner, random_batch):
    ours = learner("algo=prorl", "algo.kl_coefficient=0.1", "regime.learning_rate=1e-3")
    take_step(ours, random_batch())
    assert take_step(ours, random_batch())[0]["loss/kl"] > 0
    ours.reset_reference()
    assert ours.reference_resets == 1 and ours.reference is not None
    assert ours.optimizer.state and ours.optimizer_model is not None and ours.optimizer_model.step == 2
    assert take_step(ours, random_batch())[0]["loss/kl"] == 0.0
    assert (
        take_step(ours, random_batch())[0]["loss/kl"] > 0
    )  # the reference is a copy: it stays where it was put


def test_a_reset_optimizer_steps_as_a_new_one_at_the_same_rate(learner, random_batch):
    """Moments of a fresh learner with the same weights; the schedule goes on where it was."""
    rates = [
        "algo=capo", "optimizer.schedule=linear", "optimizer.warmup_ratio=0.0", "regime.learning_rate=1e-3",
    ]  # fmt: skip
    ours, fresh = learner(*rates), learner(*rates)
    for seed in range(3):
        take_step(ours, random_batch(seed=seed))
    ours.reset_optimizer()
    assert not ours.optimizer.state
    assert (
        ours.optimizer_model is not None
        and ours.optimizer_model.step == 0
        and not ours.optimizer_model.first.any()
    )
    fresh.model.load_state_dict(ours.model.state_dict())
    fresh.optimizer.param_groups[0]["lr"] = ours.optimizer.param_groups[0]["lr"]
    metrics, again = take_step(ours, random_batch())[0], take_step(fresh, random_batch())[0]
    assert metrics["optim/learning_rate"] == again["optim/learning_rate"] == pytest.approx(0.7e-3)
    assert same_weights(ours, fresh)


def test_a_checkpoint_keeps_a_moved_reference(learner, random_batch, tmp_path):
    ours = learner("algo=prorl", "regime.learning_rate=1e-3")
    keeper = Checkpointer(tmp_path, keep=1, run_id="ours")
    take_step(ours, random_batch())
    first = keeper.save(1, ours.state_dict(), ours.model, NO_TOKENIZER)
    assert find_reference(first) is None  # still the base model
    ours.reset_reference()
    kept = copy.deepcopy(ours.reference)
    take_step(ours, random_batch(seed=1))
    state = ours.state_dict() | {"counters": {"counter/completions": 7}}
    path = keeper.save(2, state, ours.model, NO_TOKENIZER, ours.reference)
    saved = find_reference(path)
    assert saved is not None and kept is not None
    models = (type(kept).from_pretrained(place).eval() for place in (path, saved))
    again = Learner(*models, ours.algorithm, ours.config, torch.float32)
    state = keeper.restore(path)
    assert state["counters"] == {"counter/completions": 7}
    again.load_state_dict(state)
    assert again.reference_resets == 1 and again.reference is not None
    assert all(
        torch.equal(a, b) for a, b in zip(again.reference.parameters(), kept.parameters(), strict=True)
    )
    first, second = (take_step(one, random_batch(seed=2))[0] for one in (ours, again))
    assert first["loss/kl"] == second["loss/kl"] > 0
    assert same_weights(ours, again)


def test_only_the_first_of_a_group_learns_with_the_weight_of_all(built):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    got = first_of_group(rewards, eps=1e-4)
    torch.testing.assert_close(got[:, 0], 4 * built("grpo").advantage(rewards)[:, 0])
    assert got[:, 0].all() and not got[:, 1:].any()
