"""Predicted against real: the measured moves against full logits, and what they must be when little moves."""

import copy
from dataclasses import replace
from math import isnan, sqrt

import pytest
import torch
from torch.distributions import Categorical

from capo_exp.core import policy
from capo_exp.core.policy import ForwardSettings
from capo_exp.core.types import Selection, StepRecord
from capo_exp.curvature import calibration
from capo_exp.curvature import model as curvature
from capo_exp.curvature.calibration import (
    SampleSize,
    calibration_metrics,
    sample_tokens,
    spearman,
)
from tests.conftest import VOCABULARY
from tests.pieces import untied

PREDICTED = 2e-3
ALL = SampleSize(1000, 1000)


def settings(temperature=1.0, dtype=torch.float32):
    return ForwardSettings(temperature, 1000, dtype)


def per_token(batch):
    """Advantages [B, T], whether the batch holds them by completion or by token."""
    return torch.broadcast_to(batch.advantages.view(len(batch.input_ids), -1), batch.completion_mask.shape)


def record_of(model, batch, learning_rate=1e-2, temperature=1.0):
    """What an SGD step on the batch would have seen; the support is the whole vocabulary."""
    with torch.no_grad():
        output = policy.forward(model, batch, settings(temperature), top_k=VOCABULARY)
    shifts = curvature.token_shifts(
        output.hidden, output.topk_probs, output.topk_ids, batch.token_ids, batch.advantages,
        learning_rate, None,
    )  # fmt: skip
    mask = batch.completion_mask
    none = torch.zeros_like(mask)
    return StepRecord(
        batch=batch, output=output, old_log_probs=output.log_probs, weights=mask.float(),
        kl=torch.zeros_like(output.log_probs), shifts=shifts, selection=Selection(mask), clipped=none,
    )  # fmt: skip


def moved(model, size, only=""):
    """A copy with noise on the parameters whose name holds `only`."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def by_hand(before, after, probe, temperature, last_layer):
    """KL and change of the surrogate of the probe's tokens, row by row without padding, float64."""
    before, after = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    batch, kls, gains = probe.batch, [], []
    width = batch.input_ids.shape[1] - batch.completion_mask.shape[1]
    for row in range(len(batch.input_ids)):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()][None]
        places = batch.completion_mask[row].nonzero().squeeze(1) + batch.attention_mask[row, :width].sum()
        with torch.no_grad():
            old = before(ids).logits[0, places - 1]
            states = before.model(ids).last_hidden_state[0, places - 1]
            new = states @ after.lm_head.weight.T if last_layer else after(ids).logits[0, places - 1]
        old, new = ((logits / temperature).log_softmax(-1) for logits in (old, new))
        kl = torch.nn.functional.kl_div(new, old, log_target=True, reduction="none").sum(-1)
        chosen = torch.arange(len(places)), ids[0, places]
        kls.append(kl)
        credit = per_token(batch)[row][batch.completion_mask[row]]
        gains.append(credit * (new[chosen].exp() / old[chosen].exp() - 1))
    return torch.cat(kls), torch.cat(gains)


def ranks(values):
    """Ties get the mean of the places that they fill."""
    return torch.tensor(
        [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]
    ).double()


def by_ranks(first, second):
    a, b = ranks(first.tolist()), ranks(second.tolist())
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_metrics_are_those_of_the_full_logits(small_model, random_batch, monkeypatch, temperature):
    """Of all tokens at once, and in blocks that do not divide them."""
    if temperature != 1.0:
        monkeypatch.setattr(calibration, "_BLOCK_ELEMENTS", 7 * VOCABULARY)
    record = record_of(small_model, random_batch(), temperature=temperature)
    after = moved(small_model, 0.03)
    probe = sample_tokens(small_model, record, SampleSize(6, 20), settings(temperature), seed=0)
    metrics = calibration_metrics(after, probe, settings(temperature), predicted=PREDICTED)
    kl, gain = by_hand(small_model, after, probe, temperature, last_layer=False)
    last_kl, last_gain = by_hand(small_model, after, probe, temperature, last_layer=True)
    expected = {
        "calibration/tokens": 20,
        "calibration/policy_shift/measured": kl.mean().item(),
        "calibration/policy_shift/last_layer": last_kl.mean().item(),
        "calibration/policy_shift/spearman": by_ranks(probe.policy_shift, kl),
        "calibration/policy_shift/last_layer_spearman": by_ranks(probe.policy_shift, last_kl),
        "calibration/objective_shift/measured": gain.mean().item(),
        "calibration/objective_shift/last_layer": last_gain.mean().item(),
        "calibration/objective_shift/spearman": by_ranks(probe.objective_shift, gain),
        "calibration/objective_shift/last_layer_spearman": by_ranks(probe.objective_shift, last_gain),
        "calibration/last_layer/spearman": by_ranks(last_kl, kl),
        "calibration/entropy/spearman": by_ranks(Categorical(logits=probe.log_probs).entropy(), kl),
        "calibration/ratio": kl.mean().item() / PREDICTED,
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    distinct = {round(value, 6) for value in expected.values()}
    assert len(distinct) == len(expected)  # none can stand for another


@pytest.mark.parametrize(("start", "size"), [(0.0, 1e-5), (0.0, 100.0), (100.0, -100.0)])
def test_a_tiny_move_is_not_rounded_away_and_a_huge_one_is_finite(small_model, random_batch, start, size):
    """1e-9 nats, in float32 mere rounding; 100 nats; back from a policy so sharp that q / p overflows."""
    model = moved(untied(small_model), start, "lm_head")
    after = moved(model, size, "lm_head")
    probe = sample_tokens(model, record_of(model, random_batch()), ALL, settings(), seed=0)
    kl, _ = by_hand(model, after, probe, 1.0, last_layer=False)
    metrics = calibration_metrics(after, probe, settings(), predicted=PREDICTED)
    assert kl.mean() < 1e-8 or kl.mean() > 1
    assert metrics["calibration/policy_shift/measured"] == pytest.approx(kl.mean().item(), rel=1e-2)


@pytest.mark.parametrize(("only", "last"), [("lm_head", True), ("mlp", False)])
def test_the_last_layer_explains_all_of_its_own_moves_and_none_of_the_others(
    small_model, random_batch, only, last
):
    model = untied(small_model)
    probe = sample_tokens(model, record_of(model, random_batch()), ALL, settings(), seed=0)
    assert not probe.log_probs.requires_grad and not probe.hidden.requires_grad
    metrics = calibration_metrics(moved(model, 0.03, only), probe, settings(), predicted=PREDICTED)
    for key in ("calibration/policy_shift", "calibration/objective_shift"):
        assert metrics[f"{key}/last_layer"] == (metrics[f"{key}/measured"] if last else 0.0)
        assert metrics[f"{key}/measured"] != 0.0 and not isnan(metrics[f"{key}/spearman"])
        assert isnan(metrics[f"{key}/last_layer_spearman"]) != last
    assert metrics["calibration/last_layer/spearman"] == pytest.approx(
        1.0 if last else float("nan"), nan_ok=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_if_nothing_moves_all_is_exactly_zero(small_model, random_batch, dtype):
    record = record_of(small_model, random_batch())
    probe = sample_tokens(small_model, record, SampleSize(3, 9), settings(dtype=dtype), seed=0)
    metrics = calibration_metrics(small_model, probe, settings(dtype=dtype), predicted=PREDICTED)
    assert metrics.pop("calibration/tokens") == 9
    for key, value in metrics.items():
        assert isnan(value) if key.endswith("spearman") else value == 0.0, key
    assert probe.log_probs.dtype == probe.hidden.dtype == torch.float32
    idle = calibration_metrics(small_model, probe, settings(dtype=dtype), predicted=0.0)
    assert isnan(idle["calibration/ratio"])  # the first step of a warm-up


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_an_sgd_step_on_one_token_moves_it_as_the_last_layer_model_says(
    small_model, random_batch, temperature, advantage
):
    """W' = W + lr A v h^T, so u = A |h|^2 v is exact, and with F = diag(p) - p p^T

    KL(p_old || p_new)  = 1/2 lr^2 u^T F u + O(lr^3), the mean over a' ~ p of 1/2 lr^2 <e_a' - p, u>^2,
                          of which m_F is the term of the sampled a' = a
    A (p_new/p_old - 1) = lr A s + O(lr^2) = |A| sqrt(2 m_F) + O(lr^2), as A s > 0
                        = m_H + O(lr^3)
    """
    batch = random_batch(rows=1)
    only = torch.zeros_like(batch.completion_mask)
    only[0, 3] = True
    batch = replace(batch, completion_mask=only, advantages=torch.full_like(batch.advantages, advantage))
    unit = record_of(small_model, batch, 1.0, temperature)
    s = sqrt(2 * unit.shifts.policy_shift[0, 3].item())
    errors = []
    for log_ratio in (0.3, 0.03):
        model, lr = untied(small_model), log_ratio / s
        probe = sample_tokens(
            model, record_of(model, batch, lr, temperature), ALL, settings(temperature), seed=0
        )
        log_probs = model(batch.input_ids[:, :-1]).logits[0, -7:][3].div(temperature).log_softmax(0)
        chosen = batch.token_ids[0, 3]
        (-advantage * log_probs[chosen]).backward()
        torch.optim.SGD([model.lm_head.weight], lr=lr).step()
        metrics = calibration_metrics(model, probe, settings(temperature), predicted=PREDICTED)
        kl, gain = (metrics[f"calibration/{x}/measured"] for x in ("policy_shift", "objective_shift"))
        p = log_probs.detach().double().exp()
        error = torch.eye(VOCABULARY).double()[chosen] - p
        u = advantage * probe.hidden.double().square().sum() * error
        fisher = 0.5 * lr**2 * (u @ (torch.diag(p) - torch.outer(p, p)) @ u).item()
        first_order = abs(advantage) * sqrt(2 * probe.policy_shift.item())
        second_order = probe.objective_shift.item()
        errors.append([abs(kl / fisher - 1), abs(gain / first_order - 1), abs(gain / second_order - 1)])
    large, small = errors
    assert max(small[:2]) < 0.05 and small[2] < 1e-3
    assert small[0] < 0.2 * large[0] and small[1] < 0.2 * large[1] and small[2] < 0.03 * large[2], errors


def test_the_sample_is_drawn_by_its_seed_and_from_everywhere(small_model, random_batch):
    record, state = record_of(small_model, random_batch()), torch.random.get_rng_state()
    samples = [sample_tokens(small_model, record, SampleSize(1000, 1), settings(), seed=s) for s in range(60)]
    rows = [sample.batch.input_ids[sample.batch.completion_mask.any(1)] for sample in samples]
    assert {(record.batch.input_ids == ids).all(1).nonzero().item() for ids in rows} == set(range(8))
    again = sample_tokens(small_model, record, SampleSize(1000, 1), settings(), seed=7)
    assert torch.equal(again.hidden, samples[7].hidden)
    assert torch.equal(again.batch.completion_mask, samples[7].batch.completion_mask)
    assert torch.equal(state, torch.random.get_rng_state())  # sampling elsewhere goes on undisturbed


@pytest.mark.parametrize(("completions", "tokens"), [(1, 2), (4, 9), (1000, 1000)])
def test_the_sample_holds_real_tokens_within_its_limits_with_their_own_values(
    small_model, random_batch, completions, tokens
):
    batch = random_batch()
    record = record_of(small_model, batch)
    probe = sample_tokens(small_model, record, SampleSize(completions, tokens), settings(), seed=0)
    same_row = (probe.batch.input_ids[:, None] == batch.input_ids).all(2)
    rows = same_row.float().argmax(1)
    sampled = probe.batch.completion_mask
    assert same_row.any(1).all() and len(set(rows.tolist())) == len(rows) == min(completions, 8)
    assert not (sampled & ~batch.completion_mask[rows]).any()
    assert len(probe.hidden) == sampled.sum() == min(tokens, batch.completion_mask[rows].sum())
    assert torch.equal(probe.token_ids, batch.token_ids[rows][sampled])
    assert torch.equal(probe.advantages, per_token(batch)[rows][sampled])
    assert torch.equal(probe.policy_shift, record.shifts.policy_shift[rows][sampled])
    assert torch.equal(probe.objective_shift, record.shifts.objective_shift[rows][sampled])
    log_probs = probe.log_probs.gather(1, probe.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, record.output.log_probs[rows][sampled], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.hidden, record.output.hidden[rows][sampled], rtol=1e-4, atol=1e-5)


def test_spearman_is_the_correlation_of_ranks():
    generator = torch.Generator().manual_seed(0)
    for count in (3, 10, 50):
        first = torch.randint(0, 8, (count,), generator=generator).float()  # with ties
        second = first * torch.randn(count, generator=generator).exp().double()
        assert spearman(first, second) == pytest.approx(by_ranks(first, second), abs=1e-12)
    assert spearman(torch.arange(5.0), torch.arange(5.0).exp()) == pytest.approx(1.0)
    assert spearman(torch.arange(5.0), -(torch.arange(5.0) ** 3)) == pytest.approx(-1.0)
    for undefined in ([], [1.0], [1.0, 1.0, 1.0], [1.0, float("nan"), 3.0]):
        assert isnan(spearman(torch.tensor(undefined), torch.arange(len(undefined)).float()))
