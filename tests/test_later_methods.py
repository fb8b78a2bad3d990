"""The methods of 2024 to 2026, each against its formula written plainly; built from conf/algo."""

from dataclasses import replace
from functools import partial
from math import exp, inf, log

import pytest
import torch

from capo_exp.algorithms.covariance import clip_covariance
from capo_exp.algorithms.dppo import anchored
from capo_exp.algorithms.m2po import second_moment
from capo_exp.algorithms.opsm import mask_negative
from capo_exp.algorithms.stapo import silence_spurious
from capo_exp.algorithms.surrogates import to_old_policy, to_sampler
from capo_exp.algorithms.trm import mask_completions
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from tests.pieces import inputs_of, with_step
from tests.test_methods import loss_and_gradient, off_policy, one_token


def sigmoid(x):
    return 1 / (1 + exp(-x))


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.01, 0.01), (1.0, 1.0), (4.9, 4.9), (7.0, 5.0)])
def test_cispo_bounds_the_weight_and_no_token_loses_its_gradient(built, ratio, weight, advantage):
    _, gradient, clipped = one_token(built("cispo").token_loss, ratio, advantage)
    assert gradient == pytest.approx(-weight * advantage) and clipped == (ratio > 5)


def test_gmpo_is_the_geometric_mean_of_ratios_that_are_held_one_by_one(built, random_batch):
    """-A exp(mean_t of ln r_t, held at 0.4 in the direction of A), and its gradient."""
    batch = random_batch(rows=16)
    mask = batch.completion_mask
    log_probs, old, advantages = off_policy(batch, 0.6)
    sign = advantages.sign()
    held = sign * torch.minimum(sign * (log_probs - old), torch.tensor(0.4))
    loss = -(advantages[:, 0] * ((held * mask).sum(1) / mask.sum(1)).exp()).mean()
    expected = torch.autograd.grad(loss, log_probs)[0]
    value, gradient, clipped = loss_and_gradient(built("gmpo"), batch, 0.6)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, expected)
    assert 0 < (clipped & mask).sum() < mask.sum() and not gradient[clipped].any()


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapos_gate_by_hand(built, advantage, tau):
    """4 / tau sigmoid(tau (r - 1)) at r = 3; its slope in ln pi is 4 r s (1 - s)."""
    gate = sigmoid(2 * tau)
    value, gradient, _ = one_token(built("sapo").token_loss, 3.0, advantage)
    assert value == pytest.approx(-advantage * 4 / tau * gate, rel=1e-6)
    assert gradient == pytest.approx(-advantage * 12 * gate * (1 - gate), rel=1e-6)


def test_gpg_is_the_policy_gradient_and_makes_up_for_prompts_without_a_signal(built, random_batch):
    """1 prompt of 10 has a signal: 10 (R - mean), where CPGD's weight ends at 3; no ratio in the gradient."""
    rewards = torch.tensor([[1.0, 0.0], *[[1.0, 1.0]] * 9])
    assert torch.equal(built("gpg").advantage(rewards)[0], torch.tensor([5.0, -5.0]))
    assert not built("gpg").advantage(rewards)[1:].any()
    batch = random_batch()
    _, gradient, clipped = loss_and_gradient(built("gpg"), batch, spread=2.0)
    torch.testing.assert_close(gradient, -batch.advantages.double() / batch.completion_mask.sum())
    assert not clipped.any()


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.0])
def test_dro_pulls_back_by_the_log_ratio(built, ratio, advantage):
    """Gradient -(A - beta ln r); with beta 0 GPG's. ln pi is 0, so the value is beta / 2 (ln r)^2."""
    value, gradient, _ = one_token(built("dro", "algo.token_loss.beta=0.5").token_loss, ratio, advantage)
    assert value == pytest.approx(0.25 * log(ratio) ** 2)
    assert gradient == pytest.approx(-(advantage - 0.5 * log(ratio)))
    plain = one_token(built("gpg").token_loss, ratio, advantage)
    assert one_token(built("dro", "algo.token_loss.beta=0.0").token_loss, ratio, advantage) == plain


def test_maxrl_is_the_mean_score_of_the_correct_minus_that_of_all(built):
    """R = 1, 0, 0, 0: 3, -1, -1, -1; half right: 1, -1; a prompt without a correct one says nothing."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    got = built("maxrl").advantage(rewards)
    expected = torch.tensor([[3.0, -1, -1, -1], [1, 1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(got, expected)
    scores = torch.randn(4, generator=torch.Generator().manual_seed(0))
    for row, advantage in zip(rewards[:2], got, strict=False):
        correct = scores[row == 1].mean() - scores.mean()
        torch.testing.assert_close((advantage * scores).mean(), correct)
    assert not built("maxrl").advantage(-rewards).any()  # a mean that is not positive divides nothing


def pairs_loss(batch, spread, eta):
    """REBEL's squares over the ordered pairs of rows 4 p to 4 p + 3, written plainly, and their gradient."""
    log_probs, old, advantages = off_policy(batch, spread)
    log_ratio = ((log_probs - old) * batch.completion_mask).sum(1).view(-1, 4) / eta
    rewards = advantages[:, 0].view(-1, 4)
    square = ((log_ratio[:, :, None] - log_ratio[:, None]) - (rewards[:, :, None] - rewards[:, None])) ** 2
    loss = square.sum((1, 2)).mean() / 12
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def grouped(batch, size):
    return replace(batch, group_ids=torch.arange(len(batch.group_ids)) // size)


def test_rebel_is_the_mean_square_over_the_pairs_of_a_prompt(built, random_batch):
    batch = grouped(random_batch(), 4)
    for eta in (1.0, 0.3):
        got = loss_and_gradient(built("rebel", f"algo.token_loss.eta={eta}"), batch, 0.5)
        torch.testing.assert_close(got[:2], pairs_loss(batch, 0.5, eta))


def test_vespos_ratio_is_the_product_over_the_completion(built, random_batch):
    batch = random_batch()
    log_probs, old, advantages = off_policy(batch, 0.3)
    ratio = ((log_probs - old).detach() * batch.completion_mask).sum(1, keepdim=True).exp()
    phi = torch.where(advantages > 0, ratio**2 * (3 - 3 * ratio).exp(), ratio**3 * (2 - 2 * ratio).exp())
    _, gradient, _ = loss_and_gradient(built("vespo"), batch, 0.3)
    torch.testing.assert_close(gradient, -phi * advantages / batch.completion_mask.sum())


def scored(log_probs, anchor, advantages, entropy=None):
    """A step of which every token is real; the engine and the learner agree about what sampled it."""
    mask = torch.ones_like(log_probs).bool()
    inputs = inputs_of(log_probs, anchor, advantages, mask)
    inputs = inputs if entropy is None else replace(inputs, entropy=entropy)
    step = with_step(inputs, torch.arange(len(mask))).step
    assert step is not None
    return step


def test_stapo_silences_improbable_tokens_of_positive_advantage_where_the_policy_was_sure():
    """One token of four is all three; at 0 either bound rejects nothing."""
    log_probs = torch.tensor([[0.001, 0.001, 0.001, 0.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    entropy = torch.tensor([[0.1, 0.1, 2.0, 0.1]])
    step = scored(log_probs, log_probs, advantages, entropy)
    numbers = {"probability_max": 0.01, "entropy_share": 1.0}
    assert silence_spurious(step, **numbers).keep_mask.tolist() == [[False, True, True, True]]
    for number in numbers:
        assert silence_spurious(step, **(numbers | {number: 0.0})).keep_mask.all()


def test_opsm_rejects_the_mistakes_of_completions_that_have_moved_away():
    """Mean of ln(sampler / policy): 0.6, 0.6, 0.4; only what has A < 0 and lies above 0.5 goes."""
    away = torch.tensor([[-0.9, -0.3], [-0.9, -0.3], [-0.7, -0.1]]) - 1
    advantages = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    step = scored(away, torch.full_like(away, -1), advantages)
    got = {d: mask_negative(step, log_ratio=to_sampler, divergence_max=d).keep_mask for d in (0.5, inf)}
    assert got[0.5].tolist() == [[False, False], [True, True], [True, True]] and got[inf].all()
    drawn = replace(step, batch=replace(step.batch, sampler_log_probs=away))  # the engine saw no difference
    assert mask_negative(drawn, log_ratio=to_sampler, divergence_max=0.5).keep_mask.all()
    assert not mask_negative(drawn, log_ratio=to_old_policy, divergence_max=0.5).keep_mask[0].any()


def test_trm_rejects_a_completion_for_one_token_on_either_side():
    """k3 of ln r = 0.4 is .0918, of -0.4 .0703, of 0.2 .0214."""
    moved = torch.tensor([[0.2, 0.4], [-0.4, 0.0], [0.2, -0.2]])
    step = scored(moved - 1, torch.full_like(moved, -1), torch.ones_like(moved))
    for bound, kept in ((0.05, [False, False, True]), (0.08, [False, True, True]), (inf, [True] * 3)):
        got = mask_completions(step, log_ratio=to_old_policy, divergence_max=bound).keep_mask
        assert got.tolist() == [[each] * 2 for each in kept]


def test_m2po_rejects_the_largest_log_ratios_until_the_mean_square_is_within_the_bound():
    """Squares along A: .01, .04, .25, 1: means .01, .025, .1, .325. What moved against A is free."""
    moved = torch.tensor([[0.1, 1.0, -3.0], [-0.2, -0.5, 3.0]])
    step = scored(moved - 1, torch.full_like(moved, -1), torch.tensor([[1.0], [-2.0]]).expand(2, 3))
    expected = {
        0.04: [[1, 0, 1], [1, 0, 1]],
        0.1001: [[1, 0, 1], [1, 1, 1]],
        inf: [[1, 1, 1]] * 2,
        0.0: [[0, 0, 1]] * 2,
    }
    for bound, kept in expected.items():
        got = second_moment(step, log_ratio=to_sampler, second_moment_max=bound)
        assert got.keep_mask.int().tolist() == kept


def some_step():
    generator = torch.Generator().manual_seed(0)
    log_probs, advantages = torch.randn(2, 10, 10, generator=generator, dtype=torch.float64)
    return scored(log_probs, log_probs, advantages)


def test_clip_cov_draws_a_few_tokens_between_its_bounds():
    """Of 100 tokens 4, of those whose product of deviations is in (0.5, 2); no more than there are."""
    step = some_step()
    deviations = [v - v.mean() for v in (step.batch.advantages, step.output.log_probs)]
    covariance = deviations[0] * deviations[1]
    among = (covariance > 0.5) & (covariance < 2)
    for share, count in ((0.04, 4), (1e-4, 1), (0.0, 0), (1.0, int(among.sum()))):
        got = clip_covariance(step, share=share, covariance_min=0.5, covariance_max=2.0)
        rejected = ~got.keep_mask
        assert int(rejected.sum()) == count and not (rejected & ~among).any()
    other = clip_covariance(replace(step, seed=1), share=0.04, covariance_min=0.5, covariance_max=2.0)
    first = clip_covariance(step, share=0.04, covariance_min=0.5, covariance_max=2.0)
    assert not torch.equal(first.keep_mask, other.keep_mask)


def test_kl_cov_holds_the_tokens_with_the_largest_covariance(built, random_batch):
    """Without a coefficient GRPO without a clip; with one, sign(ln r) more on a tenth of the tokens."""
    batch = random_batch(rows=16)
    log_probs, old, advantages = off_policy(batch, 0.3)
    mask, count = batch.completion_mask, int(0.1 * batch.completion_mask.sum())
    share = "algo.token_loss.share=0.1"
    plain = loss_and_gradient(built("kl_cov", share, "algo.token_loss.coefficient=0.0"), batch, 0.3)[1]
    torch.testing.assert_close(plain * mask.sum(), -(log_probs - old).exp().detach() * advantages)
    held = loss_and_gradient(built("kl_cov", share, "algo.token_loss.coefficient=0.5"), batch, 0.3)[1]
    more = (held - plain) * mask.sum()
    deviations = [v - v[mask].mean() for v in (advantages, log_probs.detach())]
    lowest = (deviations[0] * deviations[1])[mask].topk(count).values[-1]
    chosen = mask & (deviations[0] * deviations[1] >= lowest)
    torch.testing.assert_close(more, 0.5 * (log_probs - old).detach().sign() * chosen)


def test_top_entropy_keeps_a_fifth(built):
    step = some_step()
    entropy = torch.rand(10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = replace(step, output=replace(step.output, entropy=entropy))
    keep = built("grpo", "selection=top_entropy").selection(step).keep_mask
    assert keep.sum() == 20 and entropy[keep].min() > entropy[~keep].max()


def test_quatros_multiplier_holds_the_tilted_group_at_the_bound(built, random_batch):
    """A = 1 and -1: with lambda = 1 the tilted weights are sigmoid(2) and the rest, ln 2 - H nats from
    uniform. Then the gradient is -W (A - ln W); a group with one advantage, and no bound, have lambda 0."""
    first = sigmoid(2.0)
    bound = log(2) + first * log(first) + (1 - first) * log(1 - first)
    batch = grouped(random_batch(), 2)
    signs = torch.tensor([1.0, -1, 1, -1, 1, -1, 0, 0])[:, None]
    batch = replace(batch, advantages=signs * batch.completion_mask)
    log_probs, old, _ = off_policy(batch, 0.3)
    log_ratio = ((log_probs - old).detach() * batch.completion_mask).sum(1, keepdim=True)
    for limit, multiplier in ((bound, 1.0), (inf, 0.0)):
        got = loss_and_gradient(built("quatro", f"algo.token_loss.divergence_max={limit}"), batch, 0.3)[1]
        pull = multiplier * log_ratio * (signs != 0)
        torch.testing.assert_close(got, -log_ratio.exp() * (signs - pull) * batch.completion_mask / 8)


def test_quatro_is_the_lagrangian_in_value_and_starts_as_the_policy_gradient(built, random_batch):
    """W ln W - W + 1 is 0 at W = 1, so the pull starts there; the tighter the bound the larger it is."""
    batch = grouped(random_batch(), 4)
    loss, gradient, _ = loss_and_gradient(built("quatro"), batch, 0.0)
    torch.testing.assert_close(loss, -batch.advantages[:, 0].double().mean())
    torch.testing.assert_close(gradient, -batch.advantages.double() / 8)
    losses = [
        loss_and_gradient(built("quatro", f"algo.token_loss.divergence_max={d}"), batch, 0.3)[0]
        for d in (0.01, 0.1, inf)
    ]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[1]


@pytest.mark.parametrize("name", ["quatro", "vespo"])
def test_a_ratio_beyond_any_float_leaves_the_loss_finite(built, random_batch, name):
    batch = grouped(random_batch(), 4)
    for equal in (False, True):
        of = replace(batch, advantages=batch.completion_mask.float()) if equal else batch
        loss, gradient, _ = loss_and_gradient(built(name), of, 1000.0)
        assert loss.isfinite() and gradient.isfinite().all()


def test_a_token_without_an_advantage_counts_as_1_in_gmpos_mean(built):
    log_probs = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    inputs = inputs_of(log_probs, torch.zeros_like(advantages), advantages, advantages > -1)
    loss = built("gmpo").token_loss(inputs)
    torch.testing.assert_close(loss.values.detach(), -advantages)
    assert not loss.clipped.any()  # nor does a bound hold one


def test_a_loss_at_the_sampler_takes_no_correction(composed):
    twice = ("algo=dppo", "rollout/correction=token_truncation")
    with pytest.raises(ConfigError, match=r"which corrects, or algo\.token_loss\.sampler_share=0"):
        check(composed(*twice))
    check(composed(*twice, "algo.token_loss.sampler_share=0.0"))


@pytest.mark.parametrize("name", ["rebel", "quatro"])
def test_what_sees_the_step_can_be_anchored_at_the_sampler(built, random_batch, name):
    """The same loss as with the sampler's log-probs for the old ones; the pass before it is still made."""
    batch, algorithm = grouped(random_batch(), 4), built(name)
    log_probs, old, advantages = off_policy(batch, 0.3)
    elsewhere = replace(
        inputs_of(log_probs, old - 1, advantages, batch.completion_mask), sampler_log_probs=old
    )
    moved = partial(anchored, token_loss=algorithm.token_loss, sampler_share=1.0)
    got = moved(with_step(elsewhere, batch.group_ids))
    inputs = with_step(inputs_of(log_probs, old, advantages, batch.completion_mask), batch.group_ids)
    torch.testing.assert_close(got.values, algorithm.token_loss(inputs).values)
    assert replace(algorithm, token_loss=moved).scoring_pass
