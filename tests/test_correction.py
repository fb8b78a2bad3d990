"""Corrections for the sampler's log-probs: weights by hand, their properties, and the learner under them."""

from dataclasses import replace
from functools import partial
from math import inf, log, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_exp.algorithms.correction import (
    mask_geometric,
    mask_sequences,
    mask_tokens,
    truncate_sequences,
    truncate_tokens,
    uncorrected,
)
from capo_exp.config.declare import whole_step
from capo_exp.core.types import Scored, Selection
from tests.pieces import (
    SMALL,
    gradients,
    make_learner,
    plain_log_probs,
    run_updates,
    same_weights,
    take_step,
    weights,
)

CORRECTIONS = (
    "none", "token_truncation", "token_mask", "sequence_mask", "sequence_truncation", "geometric_mask"
)  # fmt: skip
GEOMETRIC = ["rollout.correction.ratio_low=0.8", "rollout.correction.ratio_high=1.25"]
"""Bounds that reject some of the completions here; the YAML has those for two engines that hardly differ."""
OTHERS = ("gspo", "reinforce_pp", "grpo_kl")
FOUR = ("kl_k1", "kl_k3", "ratio_max", "beyond_2x_fraction")


def ratios(*rows):
    """ln ratios [B, T] and the mask of those that are given; the padding holds what must not leak."""
    longest = max(map(len, rows))
    poison = [nan, inf, -inf]
    values = [[log(x) for x in row] + (poison * longest)[: longest - len(row)] for row in rows]
    mask = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(mask)


RATIOS = ratios([1.0, 0.5, 4.0, 0.25], [3.0, 1.0], [0.4, 2.0, 5.0])
"""The products of the rows are 0.5, 3 and 4."""


@pytest.mark.parametrize(
    ("weigh", "expected"),
    [
        (uncorrected, [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        (partial(truncate_tokens, ratio_cap=2.0), [[1, 0.5, 2, 0.25], [2, 1, 0, 0], [0.4, 2, 2, 0]]),
        (partial(mask_tokens, ratio_low=0.45, ratio_high=4.5), [[1, 0.5, 4, 0], [3, 1, 0, 0], [0, 2, 0, 0]]),
        (partial(mask_sequences, ratio_cap=3.5), [[0.5] * 4, [3, 3, 0, 0], [0] * 4]),
        (partial(truncate_sequences, ratio_cap=2.5), [[0.5] * 4, [2.5, 2.5, 0, 0], [2.5, 2.5, 2.5, 0]]),
        # geometric means .841, 1.73, 1.59
        (partial(mask_geometric, ratio_low=0.9, ratio_high=1.7), [[0] * 4, [0] * 4, [0.4, 2, 5, 0]]),
    ],
)
def test_weights_by_hand(weigh, expected):
    log_ratio, mask = RATIOS
    got = weigh(log_ratio.requires_grad_(), mask)
    assert not got.requires_grad
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


NUMBERS = st.sampled_from([nan, inf, -inf, 300.0, -300.0]) | st.floats(-3, 3, width=32)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4).flatmap(
        lambda t: st.lists(
            st.tuples(st.lists(NUMBERS, min_size=t, max_size=t), st.integers(0, t)), min_size=1, max_size=4
        )
    ),
    st.floats(0.01, 10),
    st.floats(0.01, 1),
    st.floats(1, 10),
)
def test_weights_are_finite_in_range_and_0_on_padding(rows, cap, low, high):
    log_ratio = torch.tensor([values for values, _ in rows])
    mask = torch.arange(log_ratio.shape[1]) < torch.tensor([[length] for _, length in rows])
    ones = uncorrected(log_ratio, mask)
    assert torch.equal(ones, mask.float())
    truncated = truncate_tokens(log_ratio, mask, ratio_cap=cap)
    masked = mask_tokens(log_ratio, mask, ratio_low=low, ratio_high=high)
    whole = mask_sequences(log_ratio, mask, ratio_cap=cap)
    capped = truncate_sequences(log_ratio, mask, ratio_cap=cap)
    geometric = mask_geometric(log_ratio, mask, ratio_low=low, ratio_high=high)
    slack = 1 + 1e-6
    for weights_ in (truncated, masked, whole, capped, geometric):
        assert weights_.isfinite().all() and (weights_ >= 0).all()
        assert not weights_[~mask].any()
    assert truncated.max() <= cap * slack and whole.max() <= cap * slack
    assert all(w == 0 or low / slack <= w <= high * slack for w in masked.flatten().tolist())
    assert all(len(set(row[m].tolist())) <= 1 for row, m in zip(whole, mask, strict=True))


def test_a_product_that_overflows_drops_the_completion():
    log_ratio, mask = torch.full((2, 3), 60.0), torch.ones(2, 3, dtype=torch.bool)
    log_ratio[1] = -60.0
    assert not mask_sequences(log_ratio, mask, ratio_cap=3.0).any()  # inf and 0
    assert truncate_tokens(log_ratio * 10, mask, ratio_cap=2.0).tolist() == [[2] * 3, [0] * 3]
    zero = torch.zeros_like(log_ratio)  # the bounds of a mask are inside
    assert mask_tokens(zero, mask, ratio_low=1.0, ratio_high=1.0).all()
    assert mask_sequences(zero, mask, ratio_cap=1.0).all()


@pytest.fixture
def make(small_model, composed):
    return lambda *overrides: make_learner(composed(*SMALL, *overrides), small_model, distance=0.05)


def off_by(batch, model, log_ratio):
    """The batch as a sampler would have given it whose log-probs are `log_ratio` below the learner's."""
    with torch.no_grad():
        sampler = (plain_log_probs(model, batch) - log_ratio) * batch.completion_mask
    return replace(batch, sampler_log_probs=sampler)


def uneven(batch, seed=1):
    """ln ratios [B, T] with ratios from 1/3 to 3 far from every cap."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1.1, -0.4, -0.1, 0.1, 0.3, 1.1])
    return choices[torch.randint(0, 6, batch.completion_mask.shape, generator=generator)]


@pytest.mark.parametrize(
    ("algo", "correction"),
    [
        *(("dr_capo", correction) for correction in CORRECTIONS[1:]),
        *((algo, "token_mask") for algo in OTHERS),
    ],
)
def test_corrected_is_the_plain_loss_of_weighted_advantages(
    make, random_batch, small_model, algo, correction
):
    """In loss, shifts, selection and the moments after it; the KL to the reference stays as it is."""
    log_ratio = uneven(random_batch())
    batch = off_by(random_batch(), small_model, log_ratio)
    mask = batch.completion_mask
    weigh = {
        "token_truncation": lambda: truncate_tokens(log_ratio, mask, ratio_cap=2.0),
        "token_mask": lambda: mask_tokens(log_ratio, mask, ratio_low=0.5, ratio_high=5.0),
        "sequence_mask": lambda: mask_sequences(log_ratio, mask, ratio_cap=3.0),
        "sequence_truncation": lambda: truncate_sequences(log_ratio, mask, ratio_cap=2.0),
        "geometric_mask": lambda: mask_geometric(log_ratio, mask, ratio_low=0.8, ratio_high=1.25),
    }[correction]
    bounds = ["policy_shift_max=2e-4", "objective_shift_min=-0.1", "objective_shift_max=0.03"]
    tight = [f"algo.selection.{bound}" for bound in bounds if algo == "dr_capo"]
    command = [f"algo={algo}", "regime.learning_rate=1e-3", *tight]
    numbers = GEOMETRIC if correction == "geometric_mask" else []
    corrected, plain = make(*command, f"rollout/correction={correction}", *numbers), make(*command)
    weighted = replace(batch, advantages=batch.advantages * weigh())
    for _ in range(2):  # the second update has the shifts of Adam's moments
        (metrics, record), (expected, other) = take_step(corrected, batch), take_step(plain, weighted)
        corrected.model.load_state_dict(small_model.state_dict())
        plain.model.load_state_dict(small_model.state_dict())
    for key in ("loss/total", "policy/grad_norm", "advantage/std", "selection/rejection_rate"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-7), key
    assert 0 < metrics["mismatch/dropped_fraction"] < 1 or correction.endswith("_truncation")
    assert 0 < metrics["selection/rejection_rate"] < 1 or not tight
    torch.testing.assert_close(record.weights, weigh(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record.batch.advantages, weighted.advantages, rtol=1e-4, atol=1e-6)
    assert torch.equal(record.batch.sampler_log_probs, batch.sampler_log_probs)
    torch.testing.assert_close(vars(record.shifts), vars(other.shifts), rtol=1e-3, atol=1e-9)
    assert torch.equal(record.selection.keep_mask, other.selection.keep_mask)
    ours, theirs = corrected.optimizer_model, plain.optimizer_model
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours.first, theirs.first, rtol=1e-3, atol=1e-7)


def test_a_masked_token_has_no_gradient_but_that_of_the_kl_to_the_reference(make, random_batch, small_model):
    batch = off_by(random_batch(), small_model, 3.0)  # ratios of 20: all are masked
    ours = make("algo=grpo", "rollout/correction=token_mask")
    before = weights(ours)
    metrics, _ = take_step(ours, batch)
    assert metrics["mismatch/dropped_fraction"] == 1.0
    assert metrics["loss/total"] == metrics["policy/grad_norm"] == 0.0
    assert {metrics[f"mismatch/corrected/{name}"] for name in FOUR} == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))
    idle = replace(batch, advantages=torch.zeros_like(batch.advantages))
    masked = gradients(make("algo=grpo_kl", "rollout/correction=token_mask"), batch)
    assert any(g.abs().max() > 1e-6 for g in masked)
    torch.testing.assert_close(masked, gradients(make("algo=grpo_kl"), idle))


def test_without_a_correction_the_samplers_log_probs_change_no_bit(make, random_batch, small_model):
    batch = random_batch()
    far = off_by(batch, small_model, uneven(batch))
    unknown = replace(batch, sampler_log_probs=torch.full_like(batch.sampler_log_probs, nan))
    learners = [make("algo=capo", "rollout/correction=none") for _ in range(3)]
    for one, given_ in zip(learners, (batch, far, unknown), strict=True):
        take_step(one, given_)
    assert same_weights(learners[0], learners[1]) and same_weights(learners[0], learners[2])


def by_hand(ratio):
    return {
        "kl_k1": -ratio.log().mean().item(),
        "kl_k3": (ratio - 1 - ratio.log()).mean().item(),
        "ratio_max": ratio.max().item(),
        "beyond_2x_fraction": ((ratio > 2) | (ratio < 0.5)).double().mean().item(),
    }


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_metrics_are_of_the_ratios_before_and_after(make, random_batch, small_model, correction):
    log_ratio = uneven(random_batch())
    batch = off_by(random_batch(), small_model, log_ratio)
    mask = batch.completion_mask
    numbers = GEOMETRIC if correction == "geometric_mask" else []
    metrics, _ = take_step(make("algo=grpo", f"rollout/correction={correction}", *numbers), batch)
    sums, counts = (log_ratio * mask).sum(1, keepdim=True), mask.sum(1, keepdim=True)
    raw, rows = log_ratio.exp()[mask], sums.exp().expand_as(mask)[mask]
    means = (sums / counts).exp().expand_as(mask)[mask]
    left = {
        "none": raw,
        "token_truncation": raw.clamp(max=2),
        "token_mask": raw[(raw >= 0.5) & (raw <= 5)],
        "sequence_mask": rows[rows <= 3],
        "sequence_truncation": rows.clamp(max=2),
        "geometric_mask": raw[(means >= 0.8) & (means <= 1.25)],
    }[correction]
    expected = {f"mismatch/{k}": v for k, v in by_hand(raw).items()}
    expected |= {f"mismatch/corrected/{k}": v for k, v in by_hand(left).items()}
    expected["mismatch/dropped_fraction"] = 1 - len(left) / len(raw)
    got = {key: value for key, value in metrics.items() if key.startswith("mismatch/")}
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert 0 < expected["mismatch/beyond_2x_fraction"] < 1
    assert len(left) < len(raw) or correction in ("none", "token_truncation", "sequence_truncation")


@pytest.mark.parametrize("correction", ["token_truncation", "sequence_mask"])
def test_micro_batches_and_later_passes_see_the_same_weights(composed, random_batch, small_model, correction):
    """The ratio is that of the weights that sampled: a second pass over the batch keeps the first's."""
    batch = off_by(random_batch(), small_model, uneven(random_batch()))
    results = []
    for size in (96, 3):
        config = composed(
            *SMALL, "algo=grpo", "algo.num_iterations=2", "regime.learning_rate=1e-2",
            f"rollout/correction={correction}", f"model.micro_batch_size={size}",
        )  # fmt: skip
        results.append(run_updates(make_learner(config, small_model), batch))
    (whole, record), (cut, same) = results
    torch.testing.assert_close(record.weights, same.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record.batch.advantages, same.batch.advantages, rtol=1e-4, atol=1e-6)
    for one, other in zip(whole, cut, strict=True):
        assert one == pytest.approx(other, rel=5e-3, abs=1e-5)
    first, second = ({k: v for k, v in m.items() if k.startswith("mismatch/")} for m in whole)
    assert first == pytest.approx(second, rel=1e-5)
    assert whole[1]["policy/ratio_max"] > 1.01


@pytest.mark.parametrize(("size", "later"), [(96, False), (3, False), (3, True)])
def test_a_selection_of_the_whole_step_sees_the_corrected_credit(
    make, random_batch, small_model, size, later
):
    """By the log-probs of the weights that sampled: the forward pass's own, or those of an earlier update."""
    batch = off_by(random_batch(), small_model, uneven(random_batch()))
    mask, seen = batch.completion_mask, list[Scored]()

    def look(scored):
        seen.append(scored)
        return Selection(scored.batch.completion_mask)

    ours = make("algo=grpo", "rollout/correction=token_mask", f"model.micro_batch_size={size}")
    ours.algorithm = replace(ours.algorithm, selection=whole_step(look))
    log_ratio = uneven(batch, seed=2 if later else 1)
    _, record = take_step(ours, batch, batch.sampler_log_probs + log_ratio if later else None)
    expected = batch.advantages * mask_tokens(log_ratio, mask, ratio_low=0.5, ratio_high=5.0)
    (scored,) = seen
    assert len(scored.batch.group_ids) == 8
    torch.testing.assert_close(scored.batch.advantages, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vars(scored.shifts), vars(record.shifts), rtol=1e-3, atol=1e-9)
