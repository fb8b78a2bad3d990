"""Which tokens an update leaves out, by CAPO and its controls, and what the learner does with that."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capo_exp.algorithms.capo import (
    batch_bounds,
    bounds_at_every_level,
    bounds_by_sign,
    bounds_in_sequence,
    completion_bounds,
    shift_bounds,
)
from capo_exp.algorithms.controls import (
    advantage_score,
    at_matched_rate,
    at_rate,
    low_probability_score,
    policy_shift_score,
    random_score,
)
from capo_exp.algorithms.down_weight import to_bounds
from capo_exp.algorithms.neutral import keep_all
from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.config.declare import whole_step
from capo_exp.config.schema import conf_dir
from capo_exp.core import policy
from capo_exp.core.batch import totals
from capo_exp.core.types import Batch, PolicyOutput, Scored, Selection, TokenLossInput, TokenShifts
from capo_exp.curvature import model as curvature
from capo_exp.training.learner import Learner
from capo_exp.training.loss import compute_loss
from tests.conftest import ALGORITHMS, DISTINCT, SELECTING
from tests.pieces import (
    BOUNDS,
    SMALL,
    UNBOUNDED,
    make_learner,
    run_updates,
    same_weights,
    take_step,
    untied,
    watch_gradients,
    weights,
)
from tests.test_curvature import random_tokens, recorded

INF = float("inf")
OFF = dict(zip(BOUNDS, (INF, -INF, INF), strict=True))
SELECTIONS = sorted(path.stem for path in (conf_dir() / "selection").glob("*.yaml"))
BASES = [name for name in ALGORITHMS if name not in SELECTING]


def bounds(policy=INF, low=-INF, high=INF):
    return dict(zip(BOUNDS, (policy, low, high), strict=True))


def score(tokens, mask, learning_rate=3e-3, state=None):
    """hidden, topk_probs, topk_ids, token_ids [B, T] and advantages [B] as a selection sees them."""
    hidden, probs, ids, token_ids, advantages = tokens
    per_token = advantages[:, None] * mask
    batch = Batch(
        input_ids=token_ids,
        attention_mask=mask.long(),
        completion_mask=mask,
        sampler_log_probs=torch.zeros_like(hidden[..., 0]),
        advantages=per_token,
        group_ids=torch.arange(len(mask)),
        truncated=torch.zeros(len(mask)).bool(),
        surprisal=torch.zeros(len(mask)),
    )
    generator = torch.Generator().manual_seed(7)
    log_probs = torch.rand(mask.shape, generator=generator, dtype=hidden.dtype).log()
    output = PolicyOutput(log_probs, torch.zeros_like(log_probs), probs, ids, hidden)
    shifts = curvature.token_shifts(hidden, probs, ids, token_ids, per_token, learning_rate, state)
    return Scored(batch, output, shifts, log_probs, learning_rate, state, seed=5)


def some_scored(rows=6, length=9):
    """Completions of different lengths; half of the tokens predict a fall, as momentum can bring."""
    lengths = torch.randint(1, length + 1, (rows, 1), generator=torch.Generator().manual_seed(2))
    scored = score(random_tokens(rows, length, 30, 8, 5), torch.arange(length) < lengths)
    signs = torch.randn(rows, length, generator=torch.Generator().manual_seed(3)).sign()
    shifts = scored.shifts
    return replace(scored, shifts=TokenShifts(shifts.policy_shift, shifts.objective_shift * signs))


def middle(values, mask):
    return values[mask].median().item()


def test_shift_bounds_are_strict_and_name_the_reason():
    scored = some_scored()
    mask, shifts = scored.batch.completion_mask, scored.shifts
    limit, high = middle(shifts.policy_shift, mask), middle(shifts.objective_shift.abs(), mask)
    got = shift_bounds(scored, **bounds(limit, -high, high))
    assert torch.equal(got.rejected_by["policy"], mask & (shifts.policy_shift >= limit))
    assert torch.equal(got.rejected_by["objective"], mask & (shifts.objective_shift.abs() >= high))
    rejected = got.rejected_by["policy"] | got.rejected_by["objective"]
    assert torch.equal(got.keep_mask, mask & ~rejected) and 0 < got.keep_mask.sum() < mask.sum()
    assert int(got.keep_mask.sum() + rejected.sum()) == int(mask.sum())
    nothing = torch.zeros_like(shifts.policy_shift)
    edge = replace(scored, shifts=TokenShifts(nothing + 0.5, nothing))
    assert not shift_bounds(edge, **bounds(0.5)).keep_mask.any()
    for low, up in ((0.0, INF), (-INF, 0.0)):
        assert not shift_bounds(edge, **bounds(INF, low, up)).keep_mask.any()


def test_infinite_bounds_keep_all_and_nan_is_rejected():
    scored = some_scored()
    got = shift_bounds(scored, **OFF)
    assert torch.equal(got.keep_mask, keep_all(scored).keep_mask)
    assert torch.equal(got.keep_mask, scored.batch.completion_mask)
    scored.shifts.policy_shift[0, 0] = scored.shifts.objective_shift[1, 0] = float("nan")
    assert shift_bounds(scored, **OFF).keep_mask[:2, 0].tolist() == [False, False]


def test_the_theorems_bound_rejects_tokens_without_advantage(composed):
    """m_H >= delta_H > 0, and m_H = 0 at A = 0; CAPO's symmetric bound keeps them, for m_F is small."""
    tokens = random_tokens(4, 3, 30, 8, 5)
    still = score((*tokens[:4], tokens[4] * torch.tensor([0.0, 1e-3, 0.0, 1e-3])), torch.ones(4, 3).bool())
    selected = {
        name: build_algorithm(composed("algo=grpo", f"selection={name}").algo).selection(still)
        for name in ("theorem", "capo")
    }
    assert not selected["theorem"].keep_mask[::2].any() and selected["capo"].keep_mask[::2].all()
    up = selected["theorem"].keep_mask
    assert torch.equal(up, selected["capo"].keep_mask & (still.shifts.objective_shift > 1e-6))


def test_at_rate_0_the_theorems_bound_rejects_nothing(composed):
    """No step is taken, so no m_H can say anything; the moments still see the first batch."""
    scored = score(random_tokens(4, 3, 30, 8, 5), torch.ones(4, 3).bool(), learning_rate=0.0)
    for name in ("theorem", "capo"):
        select = build_algorithm(composed("algo=grpo", f"selection={name}").algo).selection
        assert select(scored).keep_mask.all()
    assert not shift_bounds(scored, **bounds(0.0)).keep_mask.any()


def test_bounds_by_sign_act_on_their_own_sign():
    scored = some_scored()
    mask, shifts, positive = scored.batch.completion_mask, scored.shifts, scored.batch.advantages > 0
    limit, high = middle(shifts.policy_shift, mask), middle(shifts.objective_shift.abs(), mask)
    names = [
        f"{sign}_{what}_shift_max" for sign in ("positive", "negative") for what in ("policy", "objective")
    ]

    def by_sign(*numbers):
        return bounds_by_sign(scored, **dict(zip(names, numbers, strict=True))).keep_mask

    small = (shifts.policy_shift < limit) & (shifts.objective_shift.abs() < high)
    assert torch.equal(by_sign(limit, high, INF, INF), mask & (small | ~positive))
    assert torch.equal(by_sign(INF, INF, limit, high), mask & (small | positive))
    assert torch.equal(
        by_sign(limit, high, limit, high), shift_bounds(scored, **bounds(limit, -high, high)).keep_mask
    )
    zero = replace(scored, batch=replace(scored.batch, advantages=torch.zeros(6, 9)))
    numbers = dict(zip(names, (0.0, 0.0, INF, INF), strict=True))
    assert torch.equal(bounds_by_sign(zero, **numbers).keep_mask, mask)  # A = 0 goes with the others


@pytest.mark.parametrize("model", ["adam", "sgd"])
def test_completion_and_batch_levels_are_the_authors(reference, model):
    """Their "sentence" and "global" shifts, found with bounds just above and just below each of them."""
    state = curvature.init_adam_state(300, 16, dtype=torch.float64) if model == "adam" else None
    for step in range(3):
        row, tokens, mask = recorded(reference, model, step)
        scored = score(tokens, mask, 3e-3, state)
        for b in range(4):
            only = (torch.arange(4) == b)[:, None] & mask
            for got, expected in _around(
                row["policy_shift_sentence"][b], row["objective_shift_sentence"][b], 1e-9
            ):
                keep = completion_bounds(scored, **got).keep_mask & only
                assert torch.equal(keep, only if expected else torch.zeros_like(only))
        for got, expected in _around(row["policy_shift_global"][0], row["objective_shift_global"][0], 1e-5):
            keep = batch_bounds(scored, **got).keep_mask  # stored as float32
            assert torch.equal(keep, mask if expected else torch.zeros_like(mask))
        if state is not None:
            state = curvature.update_adam_state(state, *tokens, row["keep_mask"].bool())


def _around(policy, objective, tolerance):
    """Bounds, and whether shifts of these values pass them."""
    m_f, m_h = policy.item(), objective.item()
    slack_f, slack_h = tolerance * m_f, tolerance * abs(m_h)
    return [
        (bounds(m_f + slack_f, m_h - slack_h, m_h + slack_h), True),
        (bounds(m_f - slack_f), False),
        (bounds(INF, m_h + slack_h), False),
        (bounds(INF, -INF, m_h - slack_h), False),
    ]


def test_a_completion_is_kept_or_rejected_whole_by_its_own_tokens():
    """Its shifts are those of its mean update alone, whatever else is in the batch."""
    scored = some_scored()
    mask = scored.batch.completion_mask
    alone = [
        curvature.completion_shifts(
            curvature.pack(*(x[b : b + 1] for x in tokens_of(scored))), learning_rate=3e-3, state=None
        )[0]
        for b in range(6)
    ]
    limit = sorted(shift.policy_shift for shift in alone)[3]
    keep = completion_bounds(scored, **bounds(limit)).keep_mask
    assert keep.any(1).tolist() == [shift.policy_shift < limit for shift in alone]
    assert torch.equal(keep, mask & keep.any(1, keepdim=True))


def tokens_of(scored):
    output, batch = scored.output, scored.batch
    return (
        output.hidden, output.topk_probs, output.topk_ids, batch.token_ids, batch.advantages,
        batch.completion_mask,
    )  # fmt: skip


def test_one_completion_of_one_token_is_the_same_at_every_level():
    scored = score(random_tokens(1, 1, 30, 8, 5), torch.ones(1, 1).bool())
    m_f, m_h = scored.shifts.policy_shift, scored.shifts.objective_shift
    for got, expected in _around(m_f, m_h, 1e-9):
        kept = [
            level(scored, **got).keep_mask.item() for level in (shift_bounds, completion_bounds, batch_bounds)
        ]
        assert kept == [expected] * 3


WHOLE_STEP = {
    "batch", "levels", "all_levels", "random", "top_policy_shift", "random_matched", "advantage_matched",
    "low_probability_matched", "stapo", "m2po", "clip_cov", "top_entropy",
}  # fmt: skip


def test_levels_in_sequence_look_at_what_is_left_and_all_levels_at_everything():
    """One token with a large state spoils its completion's mean update. Alone, the completion level rejects
    the completion; after the token level has taken the token out, it keeps the rest. The product of the masks
    would keep nothing of it: that is selection=all_levels, the authors' way."""
    tokens = random_tokens(3, 4, 30, 8, 5)
    tokens[0][1, 2] *= 30
    scored = score(tokens, torch.ones(3, 4).bool())
    shifts = curvature.completion_shifts(curvature.pack(*tokens_of(scored)), learning_rate=3e-3, state=None)
    limit = 2 * max(shifts[0].policy_shift, shifts[2].policy_shift)
    token = bounds(scored.shifts.policy_shift[1, 2].item())
    alone = [
        shift_bounds(scored, **token),
        completion_bounds(scored, **bounds(limit)),
        batch_bounds(scored, **OFF),
    ]
    product = alone[0].keep_mask & alone[1].keep_mask & alone[2].keep_mask
    got = bounds_in_sequence(scored, token=token, completion=bounds(limit), batch=OFF)
    expected = torch.ones(3, 4).bool()
    expected[1, 2] = False
    assert torch.equal(got.keep_mask, expected) and product.sum() == 8
    every = bounds_at_every_level(scored, token=token, completion=bounds(limit), batch=OFF)
    assert torch.equal(every.keep_mask, product)
    assert torch.equal(every.rejected_by["policy"], ~product) and not every.rejected_by["objective"].any()
    assert got.rejected_by["policy"].nonzero().tolist() == [[1, 2]] and not got.rejected_by["objective"].any()
    # and the batch level: of what both left, all or nothing
    rest = replace(scored, batch=replace(scored.batch, completion_mask=expected))
    tokens = curvature.pack(*tokens_of(rest))
    gradients = curvature.mean_row_gradients(tokens)
    whole = curvature.batch_shifts(tokens, gradients, learning_rate=3e-3, state=None)
    for factor, kept in ((1.01, expected), (0.99, torch.zeros(3, 4).bool())):
        last = bounds(factor * whole.policy_shift)
        got = bounds_in_sequence(scored, token=token, completion=bounds(limit), batch=last)
        assert torch.equal(got.keep_mask, kept)
    assert torch.equal(got.rejected_by["policy"], torch.ones(3, 4).bool())


SHIFTS = st.floats(0, 1e3)


def shift_weights(policy, objective, limits):
    """Of one completion whose tokens have these shifts."""
    shape = (1, len(policy))
    whole = score(random_tokens(*shape, 30, 8, 5), torch.ones(shape, dtype=torch.bool))
    scored = replace(whole, shifts=TokenShifts(torch.tensor([policy]), torch.tensor([objective])))
    chosen = to_bounds(scored, policy_shift_max=limits[0], objective_shift_max=limits[1])
    assert chosen.keep_mask.all() and not chosen.rejected_by and chosen.weights is not None
    return chosen.weights[0].tolist()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SHIFTS, st.floats(-1e3, 1e3)), min_size=1, max_size=6))
def test_a_weighed_update_is_within_the_bounds_and_as_large_as_they_allow(tokens):
    shifts = [list(column) for column in zip(*tokens, strict=True)]
    for w, p, o in zip(shift_weights(*shifts, (1e-2, 1e-1)), *shifts, strict=True):
        assert 0 < w <= 1
        assert w**2 * p <= 1e-2 * (1 + 1e-4) and w * abs(o) <= 1e-1 * (1 + 1e-4)
        assert w == 1 or math.isclose(max(w**2 * p / 1e-2, w * abs(o) / 1e-1), 1, rel_tol=1e-4)


def test_shifts_that_are_not_finite_count_nothing_and_infinite_bounds_change_nothing():
    for m_f, m_h in ((math.nan, 0.0), (0.0, math.nan), (0.0, -INF)):
        assert shift_weights([m_f], [m_h], (1.0, 1.0)) == [0.0]
    assert shift_weights([1e9, 1e-9], [-1e9, 0.0], (INF, INF)) == [1.0, 1.0]


SCORES = {
    "random": random_score,
    "low_probability": low_probability_score,
    "advantage": advantage_score,
    "policy_shift": policy_shift_score,
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.33, 0.5, 1.0])
def test_at_rate_rejects_exactly_its_share_with_the_highest_scores(name, rate):
    scored = some_scored()
    mask, values = scored.batch.completion_mask, SCORES[name](scored)
    got = at_rate(scored, score=SCORES[name], rate=rate)
    rejected = got.rejected_by["score"]
    assert int(rejected.sum()) == round(rate * int(mask.sum()))
    assert torch.equal(got.keep_mask, mask & ~rejected) and not (rejected & ~mask).any()
    if 0 < rate < 1:
        assert values[rejected].min() >= values[got.keep_mask].max()


def test_the_scores_are_what_they_say():
    scored = some_scored()
    assert torch.equal(low_probability_score(scored), -scored.output.log_probs)
    assert torch.equal(policy_shift_score(scored), scored.shifts.policy_shift)
    torch.testing.assert_close(advantage_score(scored), scored.batch.advantages.abs(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_at_matched_rate_rejects_as_many_as_capo(name):
    scored = some_scored()
    mask = scored.batch.completion_mask
    high = middle(scored.shifts.objective_shift.abs(), mask)
    for limits in (
        bounds(middle(scored.shifts.policy_shift, mask), -high, high),
        bounds(INF, 1e-6, high),
        OFF,
    ):
        count = int((mask & ~shift_bounds(scored, **limits).keep_mask).sum())
        got = at_matched_rate(scored, score=SCORES[name], matched=partial(shift_bounds, **limits))
        again = at_rate(scored, score=SCORES[name], rate=count / int(mask.sum()))
        assert int(got.rejected_by["score"].sum()) == count
        assert torch.equal(got.keep_mask, again.keep_mask)
    scored.shifts.policy_shift[0, 0] = float("nan")  # CAPO rejects it, so it counts
    got = at_matched_rate(scored, score=SCORES[name], matched=partial(shift_bounds, **OFF))
    assert int(got.rejected_by["score"].sum()) == 1


def test_chance_is_the_same_for_a_seed_and_another_for_each_step(learner, random_batch):
    def kept(*overrides):
        ours = learner("algo=grpo", "selection=random", "algo.selection.rate=0.5", *overrides)
        return [take_step(ours, random_batch())[1].selection.keep_mask for _ in range(3)]

    first, again, other = kept(), kept("model.micro_batch_size=2"), kept("seed=1")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


# Bounds at which each selection rejects some of the small model's tokens, and not all.
PARTLY = {
    "by_sign": ["positive_policy_shift_max=1e-7", "positive_objective_shift_max=2e-4"],
    "all_levels": ["token.policy_shift_max=1e-6", "completion.policy_shift_max=1e-6"],
    "levels": ["token.policy_shift_max=1e-6", "completion.policy_shift_max=1e-6"],
    "batch": ["policy_shift_max=2e-7"], "random": [], "drop_truncated": [], "top_policy_shift": [],
    "policy_bound": ["policy_shift_max=1e-6"], "theorem": ["policy_shift_max=1e-6"],
    "objective_bound": ["objective_shift_max=5e-4"], "completion": ["policy_shift_max=4e-7"],
    "down_weight": ["policy_shift_max=1e-7"], "top_entropy": [], "m2po": [], "opsm": [],
    "stapo": ["probability_max=0.5", "entropy_share=0.9"], "trm": ["divergence_max=5.0"],
    "clip_cov": ["share=0.1", "covariance_min=0.1"],
}  # fmt: skip
CHANCE = ("random", "random_matched", "advantage_matched", "clip_cov")  # these draw by position


def partly(name):
    chosen = PARTLY.get(name, ["policy_shift_max=1e-6", "objective_shift_min=-2e-4"])
    within = "algo.selection.matched" if name.endswith("_matched") else "algo.selection"
    return [f"selection={name}", *(f"{within}.{number}" for number in chosen)]


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_scoring_pass_makes_micro_batches_one_batch(learner, random_batch, name):
    """Micro-batches of 2 after a scoring pass and one of 96 without: the same tokens and weights."""
    learners: list[Learner] = []
    kept: list[list[Tensor]] = []
    for size, scoring in ((2, True), (96, name in CHANCE)):
        ours = learner("algo=grpo", *partly(name), f"model.micro_batch_size={size}", "optimizer.eps=1e-3")
        assert ours.algorithm.scoring_pass == (name in WHOLE_STEP)
        select = ours.algorithm.selection
        bare = lambda scored, select=select: select(scored)  # noqa: E731
        ours.algorithm = replace(ours.algorithm, selection=whole_step(bare) if scoring else bare)
        learners.append(ours)
        chosen = [take_step(ours, random_batch(seed=seed))[1].selection for seed in range(2)]
        kept.append([one.weighed(one.keep_mask.float()) for one in chosen])
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(weights(learners[0]), weights(learners[1]), rtol=0, atol=1e-6)  # rate 1e-4
    shares = [keep.sum() / random_batch(seed=seed).completion_mask.sum() for seed, keep in enumerate(kept[0])]
    assert any(0 < share < 1 for share in shares) or (name == "batch" and shares == [1, 0]), shares


@pytest.mark.parametrize(("name", "rows"), [("capo", [4, 4]), ("random", [8])])
def test_what_decides_about_the_whole_step_sees_it_whole(learner, random_batch, name, rows):
    """Then a mean over kept tokens is one over all micro-batches, too: N / kept times the mean over all."""
    found, seen = [], list[int]()
    for mean in ("token_mean", "token_mean_over_kept"):
        aggregation = f"algo.aggregation._target_=capo_exp.algorithms.aggregation.{mean}"
        ours = learner("algo=dapo", *partly(name), "model.micro_batch_size=4", aggregation)
        genuine = ours.algorithm.selection

        def look(scored, genuine=genuine):
            seen.append(len(scored.batch.group_ids))
            return genuine(scored)

        marked = whole_step(look) if name == "random" else look
        ours.algorithm = replace(ours.algorithm, selection=marked)
        gradients, batch = watch_gradients(ours), random_batch()
        _, record = take_step(ours, batch)
        found.append(gradients[0])
    assert seen == [*rows, 8]
    factor = batch.completion_mask.sum() / record.selection.keep_mask.sum()
    assert 1 < factor < INF
    torch.testing.assert_close([factor * g for g in found[0]], found[1], rtol=1e-4, atol=1e-7)


PAIRS = [(BASES[5 * i % len(BASES)], name) for i, name in enumerate(SELECTIONS)]
PAIRS += [(name, "capo") for name in BASES if (name, "capo") not in PAIRS]


@pytest.mark.parametrize(("algo", "selection"), PAIRS)
def test_a_selection_goes_on_any_algorithm_by_yaml_and_rejected_tokens_have_no_gradient(
    learner, random_batch, algo, selection
):
    """The loss of the two YAMLs, KL too, has no gradient at rejected tokens and one at kept ones."""
    given = (f"algo={algo}", *partly(selection), "model.micro_batch_size=4")
    ours, batch = learner(*given, distance=0.05), random_batch()
    assert (ours.config.algo.name, ours.config.algo.full_name) == (algo, f"{algo}-{selection}")
    metrics, record = take_step(ours, batch)
    keep, mask = record.selection.keep_mask, batch.completion_mask
    rate = 1 - keep.sum().item() / mask.sum().item()
    assert metrics["selection/rejection_rate"] == pytest.approx(rate) and not (keep & ~mask).any()
    generator = torch.Generator().manual_seed(0)
    keep = mask & (torch.rand(mask.shape, generator=generator) < 0.5)
    log_probs = record.output.log_probs.clone().requires_grad_()
    old = log_probs.detach() + 1e-5 * torch.randn(mask.shape, generator=generator)
    sizes = replace(totals(batch), kept_tokens=int(keep.sum()))
    output = replace(record.output, log_probs=log_probs)
    reference = ours.reference_log_probs(batch, log_probs.detach())
    step = Scored(
        batch, output.detached(), record.shifts, old, 0.0, None, seed=0, ref_log_probs=reference
    )  # fmt: skip
    seen = log_probs, old, old, batch.advantages, mask, output.entropy
    inputs = TokenLossInput(*seen, step, torch.arange(8))
    loss = compute_loss(ours.algorithm, inputs, reference, Selection(keep), batch, sizes)
    (gradient,) = torch.autograd.grad(loss.value, log_probs)
    assert torch.equal(gradient != 0, keep)


BOUNDED = [((f"algo={name}", "selection=capo"), name) for name in DISTINCT]
BOUNDED += [(("algo=capo",), "grpo"), (("algo=dr_capo",), "dr_grpo"), (("algo=rein_capo",), "reinforce")]


@pytest.mark.parametrize(("bounded", "base"), BOUNDED)
def test_capo_without_bounds_is_its_base_bit_for_bit_and_with_every_token_rejected_nothing_moves(
    learner, small_model, random_batch, bounded, base
):
    given = ("regime.learning_rate=1e-3", "model.micro_batch_size=4")
    plain, free = learner(f"algo={base}", *given), learner(*bounded, *UNBOUNDED, *given)
    expected, got = (
        [line for seed in range(2) for line in run_updates(one, random_batch(seed=seed), seed)[0]]
        for one in (plain, free)
    )
    assert got == expected and same_weights(plain, free)
    still = list(small_model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(weights(plain), still, strict=True))
    none = learner(*bounded, *given, "algo.selection.policy_shift_max=0.0", distance=0.05)
    metrics, record = run_updates(none, random_batch())
    reasons = ("selection/rejection_rate", "selection/rejection_rate_policy")
    for line in metrics:
        assert [line[key] for key in ("loss/total", "policy/grad_norm", *reasons)] == [0.0, 0.0, 1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(weights(none), still, strict=True))
    assert not record.selection.keep_mask.any()


@pytest.mark.parametrize(("warm_up", "advantage"), [(0, 1.5), (1, -0.7), (4, 1.5)])
def test_live_moments_predict_the_real_optimisers_next_step(
    small_model, composed, random_batch, warm_up, advantage
):
    """With one token kept of N the loss is -A ln pi(a) / N, so the step that it is predicted to cause is the
    step that torch's Adam takes: u = (W' - W) h / lr, s = <v, u>, m_F = 1/2 (lr s)^2 and m_H as in section
    1.4, with v and pi of the full softmax. Also for Adam's first step, which has no moments."""
    rate = 1e-2
    config = composed(
        *SMALL, "algo=dapo", "curvature.optimizer_model=adam_live", "curvature.top_k=40",
        f"regime.learning_rate={rate}", "rollout.temperature=0.7", "optimizer.eps=1e-6",
    )  # fmt: skip
    ours = make_learner(config, untied(small_model))
    assert ours.optimizer_model is None
    for seed in range(warm_up):
        take_step(ours, random_batch(seed=seed))
    batch = random_batch(seed=9)
    batch = replace(batch, advantages=advantage * batch.completion_mask)
    only = torch.zeros_like(batch.completion_mask)
    only[2, 0] = True
    ours.algorithm = replace(ours.algorithm, selection=whole_step(lambda _: Selection(only)))
    head = policy.last_layer(ours.model).weight
    before = head.detach().clone()
    metrics, record = take_step(ours, batch)
    h, token = record.output.hidden[2, 0].double(), int(batch.token_ids[2, 0])
    probs = (before.double() @ h).softmax(0)
    error = torch.nn.functional.one_hot(torch.tensor(token), 40) - probs
    change = (head.detach().double() - before.double()) @ h / rate
    s = error @ change
    variance = probs @ change.square() - (probs @ change) ** 2
    m_f = 0.5 * (rate * s) ** 2
    m_h = advantage * (rate * s + 0.5 * rate**2 * (s**2 - variance))
    assert m_f > 1e-6
    assert record.shifts.policy_shift[2, 0].item() == pytest.approx(m_f.item(), rel=2e-3)
    assert record.shifts.objective_shift[2, 0].item() == pytest.approx(m_h.item(), rel=2e-3)
    assert metrics["curvature/batch/policy_shift"] == pytest.approx(m_f.item() / 8, rel=2e-3)
    assert metrics["curvature/batch/objective_shift"] == pytest.approx(m_h.item(), rel=2e-3)


def test_live_moments_are_views_of_the_optimisers(learner, random_batch):
    ours = learner("algo=grpo", "curvature.optimizer_model=adam_live")
    sizes = totals(random_batch())
    moments = ours.moments(sizes)
    assert moments is not None and not moments.first.any()
    take_step(ours, random_batch())
    moments, state = ours.moments(sizes), ours.optimizer.state[policy.last_layer(ours.model).weight]
    assert moments is not None and moments.first.data_ptr() == state["exp_avg"].data_ptr()
    assert moments.second.data_ptr() == state["exp_avg_sq"].data_ptr()
    assert (moments.step, moments.betas, moments.eps) == (1, (0.9, 0.999), 1e-8)
    assert moments.slot_of_id.tolist() == list(range(40))


def test_a_hidden_shift_is_the_state_of_the_token_itself(small_model, random_batch):
    """hidden_shift=1 takes the state one token later, as the authors' program does; all else stays."""
    batch = random_batch()
    settings = policy.ForwardSettings(0.7, 100, torch.float32)
    plain, late = (
        policy.forward(small_model, batch, settings, top_k=8, hidden_shift=shift) for shift in (0, 1)
    )
    torch.testing.assert_close(late.log_probs, plain.log_probs, rtol=0, atol=1e-5)
    for name in ("entropy", "topk_probs"):
        torch.testing.assert_close(getattr(late, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(late.topk_ids[batch.completion_mask], plain.topk_ids[batch.completion_mask])
    for row in range(8):
        ids = batch.input_ids[row, batch.attention_mask[row].bool()]
        count = int(batch.completion_mask[row].sum())
        states = small_model.base_model(ids[None]).last_hidden_state[0].detach() / 0.7
        torch.testing.assert_close(plain.hidden[row, :count], states[-count - 1 : -1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(late.hidden[row, :count], states[-count:], rtol=1e-3, atol=1e-4)


def test_a_selections_rows_are_those_of_the_micro_batch():
    keep = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool()
    whole = Selection(keep, {"policy": ~keep}, weights=torch.arange(9.0).view(3, 3) / 8)
    part = whole.of_rows(torch.tensor([2, 0]), some_scored(2, 2).batch)
    assert part.weights is not None and part.weights.tolist() == [[6 / 8, 7 / 8], [0, 1 / 8]]
    assert part.keep_mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(part.rejected_by["policy"], ~part.keep_mask)
