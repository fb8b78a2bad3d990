"""The properties that define the methods of 2024 to 2026, each against its formula written plainly, its base,
or TRL's program; the parts are built from conf/algo."""

from collections.abc import Callable
from math import exp, expm1, log

import pytest
import torch
from torch import Tensor

from capo_exp.algorithms.protocols import Algorithm, build_algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core.types import Batch
from tests.test_methods import loss_and_gradient, off_policy, one_token, plain_sequence_gradient

Built = Callable[..., Algorithm]
Batches = Callable[..., Batch]
FREE = ("algo.token_loss.clip_eps_low=1.0", "algo.token_loss.clip_eps_high=inf")


@pytest.fixture
def built(composed: Callable[..., TrainConfig]) -> Built:
    """`built("cispo", ...)` is the algorithm of conf/algo/cispo.yaml."""
    return lambda name, *overrides: build_algorithm(composed(f"algo={name}", *overrides).algo)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.01, 0.01), (1.0, 1.0), (4.9, 4.9), (7.0, 5.0)])
def test_cispo_bounds_the_weight_and_no_token_loses_its_gradient(
    built: Built, ratio: float, weight: float, advantage: float
) -> None:
    _, gradient, clipped = one_token(built("cispo").token_loss, ratio, advantage)
    assert gradient == pytest.approx(-weight * advantage) and clipped == (ratio > 5)
    free = one_token(built("cispo", *FREE).token_loss, ratio, advantage)[1]
    assert free == pytest.approx(one_token(built("grpo_no_clip").token_loss, ratio, advantage)[1])


def test_gmpo_is_the_geometric_mean_of_ratios_that_are_held_one_by_one(
    built: Built, random_batch: Batches
) -> None:
    """-A exp(mean_t of ln r_t, held at 0.4 in the direction of A), and its gradient; without bounds GSPO."""
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
    bounds = [f"algo.token_loss.log_ratio_{side}=inf" for side in ("low", "high")]
    for one, other in zip(
        loss_and_gradient(built("gmpo", *bounds), batch, 0.6),
        loss_and_gradient(built("gspo", *FREE), batch, 0.6), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapos_gate_by_hand_and_at_its_limits(built: Built, advantage: float, tau: float) -> None:
    """4 / tau sigmoid(tau (r - 1)) at r = 3; its slope in ln pi is 4 r s (1 - s). At r = 1 that is 1; as tau
    goes to 0 it is r."""
    gate = sigmoid(2 * tau)
    value, gradient, _ = one_token(built("sapo").token_loss, 3.0, advantage)
    assert value == pytest.approx(-advantage * 4 / tau * gate, rel=1e-6)
    assert gradient == pytest.approx(-advantage * 12 * gate * (1 - gate), rel=1e-6)
    assert one_token(built("sapo").token_loss, 1.0, advantage)[1] == pytest.approx(-advantage)
    small = [f"algo.token_loss.{side}_temperature=1e-3" for side in ("positive", "negative")]
    assert one_token(built("sapo", *small).token_loss, 3.0, advantage)[1] == pytest.approx(
        -3 * advantage, rel=1e-4
    )


def test_gpg_is_the_policy_gradient_and_makes_up_for_prompts_without_a_signal(
    built: Built, random_batch: Batches
) -> None:
    """1 prompt of 10 has a signal: 10 (R - mean), where CPGD's weight ends at 3; no ratio in the gradient."""
    rewards = torch.tensor([[1.0, 0.0], *[[1.0, 1.0]] * 9])
    assert torch.equal(built("gpg").advantage(rewards)[0], torch.tensor([5.0, -5.0]))
    assert not built("gpg").advantage(rewards)[1:].any()
    batch = random_batch()
    _, gradient, clipped = loss_and_gradient(built("gpg"), batch, spread=2.0)
    torch.testing.assert_close(gradient, -batch.advantages.double() / batch.completion_mask.sum())
    assert not clipped.any()


def test_luspo_is_gspo_times_the_length(built: Built, random_batch: Batches) -> None:
    batch = random_batch(rows=32)
    _, gradient, clipped = loss_and_gradient(built("luspo"), batch, spread=5e-3)
    _, expected, rows = plain_sequence_gradient(batch, 5e-3, mean=True, low=2e-3, high=2.5e-3)
    torch.testing.assert_close(gradient, expected * batch.completion_mask.sum(1, keepdim=True))
    assert 0 < rows.sum() < 32 and torch.equal(clipped.any(1), rows)


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.0])
def test_dro_pulls_back_by_the_log_ratio(built: Built, ratio: float, advantage: float) -> None:
    """Gradient -(A - beta ln r); with beta 0 GPG's. ln pi is 0, so the value is beta / 2 (ln r)^2."""
    value, gradient, _ = one_token(built("dro", "algo.token_loss.beta=0.5").token_loss, ratio, advantage)
    assert value == pytest.approx(0.25 * log(ratio) ** 2)
    assert gradient == pytest.approx(-(advantage - 0.5 * log(ratio)))
    plain = one_token(built("gpg").token_loss, ratio, advantage)
    assert one_token(built("dro", "algo.token_loss.beta=0.0").token_loss, ratio, advantage) == plain


def test_maxrl_is_the_mean_score_of_the_correct_minus_that_of_all(built: Built) -> None:
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


def pairs_loss(batch: Batch, spread: float, eta: float) -> tuple[Tensor, Tensor]:
    """REBEL's squares over the ordered pairs of rows 4 p to 4 p + 3, written plainly, and their gradient."""
    log_probs, old, advantages = off_policy(batch, spread)
    log_ratio = ((log_probs - old) * batch.completion_mask).sum(1).view(-1, 4) / eta
    rewards = advantages[:, 0].view(-1, 4)
    square = ((log_ratio[:, :, None] - log_ratio[:, None]) - (rewards[:, :, None] - rewards[:, None])) ** 2
    loss = square.sum((1, 2)).mean() / 12
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def grouped(batch: Batch, size: int) -> Batch:
    return Batch(**{**vars(batch), "group_ids": torch.arange(len(batch.group_ids)) // size})


def test_rebel_is_the_mean_square_over_the_pairs_of_a_prompt(built: Built, random_batch: Batches) -> None:
    batch = grouped(random_batch(), 4)
    for eta in (1.0, 0.3):
        got = loss_and_gradient(built("rebel", f"algo.token_loss.eta={eta}"), batch, 0.5)
        torch.testing.assert_close(got[:2], pairs_loss(batch, 0.5, eta))


def test_rebel_starts_as_rloo_and_ends_where_log_ratios_are_rewards(
    built: Built, random_batch: Batches
) -> None:
    batch = grouped(random_batch(), 4)
    centred = batch.advantages[:, :1].view(2, 4)
    leave_one_out = built("rloo").advantage(centred).view(8, 1)
    _, gradient, _ = loss_and_gradient(built("rebel"), batch, spread=0.0)
    torch.testing.assert_close(gradient, (-4 * leave_one_out * batch.completion_mask / 8).double())
    log_ratio = (off_policy(batch, 0.5)[0].detach() - off_policy(batch, 0.5)[1]) * batch.completion_mask
    solved = Batch(
        **{**vars(batch), "advantages": (log_ratio.sum(1, keepdim=True) + 7) * batch.completion_mask}
    )
    loss, gradient, _ = loss_and_gradient(built("rebel"), solved, 0.5)
    assert loss < 1e-9 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("advantage", "power", "rate"), [(1.0, 2, 3), (-1.0, 3, 2)])
@pytest.mark.parametrize("ratio", [1e-3, 0.5, 1.0, 2.0, 1e30])
def test_vespo_weighs_by_the_completions_ratio(
    built: Built, advantage: float, power: int, rate: int, ratio: float
) -> None:
    """W^k exp(k' (1 - W)): 1 at W = 1 and 0 far away; without power and rate the policy gradient."""
    phi = exp(power * log(ratio) - rate * expm1(log(ratio))) if ratio < 1e9 else 0.0
    assert one_token(built("vespo").token_loss, ratio, advantage)[1] == pytest.approx(-phi * advantage)
    off = [
        f"algo.token_loss.{sign}_{what}=0.0"
        for sign in ("positive", "negative")
        for what in ("power", "rate")
    ]
    assert one_token(built("vespo", *off).token_loss, ratio, advantage)[1] == pytest.approx(-advantage)


def test_vespos_ratio_is_the_product_over_the_completion(built: Built, random_batch: Batches) -> None:
    batch = random_batch()
    log_probs, old, advantages = off_policy(batch, 0.3)
    ratio = ((log_probs - old).detach() * batch.completion_mask).sum(1, keepdim=True).exp()
    phi = torch.where(advantages > 0, ratio**2 * (3 - 3 * ratio).exp(), ratio**3 * (2 - 2 * ratio).exp())
    _, gradient, _ = loss_and_gradient(built("vespo"), batch, 0.3)
    torch.testing.assert_close(gradient, -phi * advantages / batch.completion_mask.sum())
