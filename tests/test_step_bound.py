"""The policy shift of the whole optimiser step, bounded: by measuring it, by predicting it, by both."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from capo_exp.algorithms import step_bound
from capo_exp.core import policy
from capo_exp.core.step import StepDecision, StepTrial
from capo_exp.runs.checkpoint import Checkpointer
from capo_exp.training.optimizer_step import TrainingDiverged
from tests.pieces import NO_TOKENIZER, same_weights, take_step, weights

LARGE = {"completions": 99, "tokens": 9999}
FREE = {"policy_shift_max": float("inf"), **LARGE}
MEASURED = partial(step_bound.measured, policy_shift_max=1e-3, max_looks=8, **LARGE)
CALIBRATED = partial(
    step_bound.calibrated, policy_shift_max=1e-3, every=3, memory_share=0.5, max_looks=8, **LARGE
)


@pytest.fixture
def ruled(learner):
    def make(rule=None, *overrides):
        made = learner("algo=grpo", "regime.learning_rate=3e-2", *overrides)
        if rule is not None:
            made.algorithm = replace(made.algorithm, step_rule=rule)
        return made

    return make


@pytest.mark.parametrize(
    ("rule", "rate"),
    [("predicted", "1e38"), ("measured", "3e37"), ("calibrated", "3e37"), ("evidence", "3e37")],
)
def test_a_rate_beyond_float32_ends_as_any_divergence(learner, random_batch, rule, rate):
    """1e38 / (1 - beta1) is no float32: torch raises; 3e37 leaves weights whose shift is not a number."""
    ours = learner("algo=grpo", f"step_rule={rule}", f"regime.learning_rate={rate}")
    said = r"optimizer step 1: not finite: (a step at rate 1e\+38|.*=nan)"
    with pytest.raises(TrainingDiverged, match=said):
        take_step(ours, random_batch())


def log_probs(model, batch, head=None):
    """[n, V] of every completion token, row by row; with another last layer on the same states."""
    rows = []
    for ids, real, mask in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        count = int(mask.sum())
        states = model.model(ids[real.bool()][None]).last_hidden_state[0, -count - 1 : -1]
        weight = policy.last_layer(model).weight if head is None else head
        rows.append((states @ weight.T).log_softmax(1))
    return torch.cat(rows).double()


def mean_kl(old, new):
    return (old.exp() * (old - new)).sum(1).mean().item()


@torch.no_grad()
def moved(before, after, batch):
    return mean_kl(log_probs(before, batch), log_probs(after, batch))


def looking(seen, *, step_scale=1.0):
    def rule(trial):
        trial.take(completions=99, tokens=9999)
        seen.append(trial)
        return StepDecision(step_scale)

    return rule


def test_a_trial_looks_at_any_part_of_the_step_and_settles_on_one(ruled, random_batch):
    seen: list[StepTrial] = []
    ours, batch = ruled(looking(seen)), random_batch()
    before = copy.deepcopy(ours.model)
    take_step(ours, batch)
    (trial,) = seen
    whole = copy.deepcopy(ours.model)
    start, end = ([p.detach() for p in model.parameters()] for model in (before, whole))
    assert trial.measured(1.0) == pytest.approx(moved(before, whole, batch), rel=1e-4)
    for scale in (0.5, 0.1, 0.7):
        found = trial.measured(scale)
        expected = [torch.lerp(a, b, scale) for a, b in zip(start, end, strict=True)]
        torch.testing.assert_close(weights(ours), expected, rtol=1e-4, atol=1e-6)
        assert found == pytest.approx(moved(before, ours.model, batch), rel=1e-3)
        head = torch.lerp(policy.last_layer(before).weight, policy.last_layer(whole).weight, scale).detach()
        with torch.no_grad():
            alone = mean_kl(log_probs(before, batch), log_probs(before, batch, head))
        assert trial.last_layer(scale) == pytest.approx(alone, rel=1e-3)
    trial.settle(0.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), start, strict=True))


def test_a_part_of_the_step_is_the_step_at_that_part_of_the_rate(ruled, random_batch):
    settled = ruled(looking([], step_scale=0.3), "optimizer.weight_decay=0.1")
    scaled = ruled(lambda _: StepDecision(0.3), "optimizer.weight_decay=0.1")
    for seed in range(3):
        for one in (settled, scaled):
            take_step(one, random_batch(seed=seed))
    torch.testing.assert_close(weights(settled), weights(scaled), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        partial(step_bound.measured, max_looks=3, **FREE),
        partial(step_bound.predicted, **FREE),
        partial(step_bound.calibrated, every=2, memory_share=0.5, max_looks=3, **FREE),
        partial(step_bound.evidence, share=float("inf"), memory_share=0.5, **LARGE),
    ],
)
def test_without_a_bound_it_is_the_whole_step_bit_for_bit(rule, ruled, random_batch):
    plain, ours = ruled(), ruled(rule)
    for seed in range(3):
        for one in (plain, ours):
            take_step(one, random_batch(seed=seed))
    assert same_weights(plain, ours)


@pytest.mark.parametrize("bound", [1e-1, 1e-2, 1e-4])
def test_measured_keeps_the_real_shift_within_the_bound(bound, ruled, random_batch):
    ours = ruled(partial(MEASURED, policy_shift_max=bound))
    for seed in range(4):
        before, batch = copy.deepcopy(ours.model), random_batch(seed=seed)
        metrics, _ = take_step(ours, batch)
        real = moved(before, ours.model, batch)
        assert real <= 1.001 * bound
        assert metrics["step/policy_shift_measured"] == pytest.approx(real, rel=1e-3)
        if metrics["optim/step_scale"] < 1:
            assert real > 0.3 * bound  # no shorter than it needs to be


def test_measured_gives_up_after_so_many_looks(ruled, random_batch):
    ours = ruled(partial(MEASURED, policy_shift_max=1e-12, max_looks=1))
    metrics, _ = take_step(ours, random_batch())
    assert metrics["optim/step_scale"] == 1.0 and metrics["step/policy_shift_measured"] > 1e-12


def test_predicted_bounds_the_last_layers_part_without_a_forward_pass(ruled, random_batch):
    bound = 1e-5
    ours, batch = ruled(partial(step_bound.predicted, policy_shift_max=bound, **LARGE)), random_batch()
    before, plain, passes = copy.deepcopy(ours.model), ruled(), []
    for one in (plain, ours):
        one.model.base_model.register_forward_pre_hook(lambda model, _: passes.append(model))
    metrics, _ = [take_step(one, batch) for one in (plain, ours)][-1]
    assert passes.count(plain.model.base_model) == passes.count(ours.model.base_model) > 0
    assert metrics["optim/step_scale"] < 0.5
    head = policy.last_layer(ours.model).weight
    with torch.no_grad():
        part = mean_kl(log_probs(before, batch), log_probs(before, batch, head))
    assert part == pytest.approx(bound, rel=0.2)
    assert moved(before, ours.model, batch) > 2 * bound  # the other layers move it further


def test_calibrated_measures_every_so_many_steps_and_holds_the_bound_between(ruled, random_batch):
    bound = 1e-3
    ours = ruled(partial(CALIBRATED, policy_shift_max=bound, memory_share=0.0))
    reals, measured = [], []
    for seed in range(7):
        before, batch = copy.deepcopy(ours.model), random_batch(seed=seed)
        metrics, _ = take_step(ours, batch)
        reals.append(moved(before, ours.model, batch))
        measured.append("step/policy_shift_measured" in metrics)
        if measured[-1]:
            assert metrics["step/policy_shift_measured"] == pytest.approx(reals[-1], rel=1e-3)
        assert metrics["step/policy_shift_predicted"] <= 1.1 * bound
    assert measured == [True, False, False, True, False, False, True]
    assert all(real <= 1.001 * bound for real, seen in zip(reals, measured, strict=True) if seen)
    assert all(bound / 10 < real < 10 * bound for real in reals)


def test_the_ratio_is_remembered_as_a_geometric_mean(ruled, random_batch):
    def ratios(memory_share):
        rule = partial(step_bound.calibrated, every=1, memory_share=memory_share, max_looks=1, **FREE)
        ours = ruled(rule)
        return [take_step(ours, random_batch(seed=seed))[0]["step/ratio"] for seed in range(3)]

    fresh, kept = ratios(0.0), ratios(0.5)
    assert kept[0] == pytest.approx(fresh[0])
    assert kept[1] == pytest.approx((fresh[0] * fresh[1]) ** 0.5)
    assert kept[2] == pytest.approx((kept[1] * fresh[2]) ** 0.5)


def test_a_resumed_run_remembers_the_ratio(ruled, random_batch, tmp_path):
    straight = ruled(CALIBRATED)
    for seed in range(2):
        take_step(straight, random_batch(seed=seed))
    checkpointer = Checkpointer(tmp_path, keep=1, run_id="ours")
    path = checkpointer.save(2, straight.state_dict(), straight.model, NO_TOKENIZER)
    resumed = ruled(CALIBRATED)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.load_state_dict(checkpointer.restore(path))
    assert resumed.step_memory == straight.step_memory and resumed.step_memory["since"] == 2
    for one in (straight, resumed):
        take_step(one, random_batch(seed=2))
    assert same_weights(straight, resumed)


def test_until_a_ratio_is_known_every_step_is_measured(ruled, random_batch):
    """A warm-up begins at rate 0, where nothing moves and nothing is learned about the ratio."""
    ours = ruled(partial(CALIBRATED, every=5), "optimizer.schedule=linear", "optimizer.warmup_ratio=0.2")
    seen = []
    for seed in range(4):
        before, batch = copy.deepcopy(ours.model), random_batch(seed=seed)
        metrics, _ = take_step(ours, batch)
        seen.append("step/policy_shift_measured" in metrics)
        if seen[-1]:
            assert moved(before, ours.model, batch) <= 1.001e-3
    assert seen == [True, True, False, False]


def test_a_step_that_moves_nothing_is_taken_whole(ruled, random_batch):
    idle = replace(random_batch(), advantages=torch.zeros(8, 7))
    for rule in (MEASURED, CALIBRATED):
        ours = ruled(partial(rule, policy_shift_max=1e-6))
        metrics, _ = take_step(ours, idle)
        assert metrics["optim/step_scale"] == 1.0
        assert "step/ratio" not in metrics


def test_a_last_layer_that_stands_still_says_nothing_about_the_ratio(ruled, random_batch):
    """So short a part of a step moves its log-probs by less than a float32 shows."""
    ours = ruled(
        partial(
            step_bound.calibrated, policy_shift_max=1e-30, every=1, memory_share=0.5, max_looks=2, **LARGE
        )
    )
    metrics, _ = take_step(ours, random_batch())
    assert metrics["optim/step_scale"] < 1e-6 and "step/ratio" not in metrics


EVIDENCE = partial(step_bound.evidence, memory_share=0.5, **LARGE)


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-4])
def test_evidence_keeps_the_real_shift_within_what_the_rewards_say(share, ruled, random_batch):
    """Shortened by a ratio of the steps before and once more by a look, so within a factor, not exactly."""
    ours = ruled(partial(EVIDENCE, share=share))
    shortened = 0
    for seed in range(6):
        before, batch = copy.deepcopy(ours.model), random_batch(seed=seed)
        metrics, record = take_step(ours, batch)
        bound = share * step_bound.reward_evidence(record)
        assert metrics["step/policy_shift_bound"] == pytest.approx(bound)
        assert 0 < moved(before, ours.model, batch) < 1.5 * bound
        shortened += metrics["optim/step_scale"] < 0.9
    assert shortened >= 4


def test_where_no_reward_differs_momentum_takes_no_step(ruled, random_batch):
    """Whatever the credits are: those of rloo differ by the KL in the reward."""
    ours, batch = ruled(partial(EVIDENCE, share=float("inf"))), random_batch()
    take_step(ours, batch)
    before, same = weights(ours), replace(batch, surprisal=torch.zeros(8))
    metrics, _ = take_step(ours, same)
    assert metrics["optim/step_scale"] == 0 and ours.optimizer_step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))
    assert "ratio" in ours.step_memory  # of the step before


def test_evidence_is_the_entropy_of_rewards_within_a_prompt(ruled, random_batch):
    """Two of four, all alike, one of four; a correction changes nothing but by what it drops whole."""
    _, record = take_step(ruled(), random_batch(rows=12, length=3))
    rewards = torch.tensor([[1, -1, 1, -1], [5, 5, 5, 5], [2, 1, 1, 1.0]])
    quarter = -math.log(1 / 4), -math.log(3 / 4)
    surprisal = [math.log(2)] * 4 + [0.0] * 4 + [quarter[0]] + [quarter[1]] * 3
    assert step_bound.reward_surprisal(rewards).flatten().tolist() == pytest.approx(surprisal)
    batch = replace(record.batch, surprisal=torch.tensor(surprisal))
    mask = batch.completion_mask
    for weights_ in (record.weights, record.weights * (0.5 + torch.rand(mask.shape))):
        found = step_bound.reward_evidence(replace(record, batch=batch, weights=weights_))
        assert found == pytest.approx(sum(surprisal) / mask.sum().item())
    dropped = record.weights * (torch.arange(12) >= 4)[:, None]
    found = step_bound.reward_evidence(replace(record, batch=batch, weights=dropped))
    assert found == pytest.approx(sum(surprisal[4:]) / mask[4:].sum().item())
    assert step_bound.reward_evidence(replace(record, batch=batch, weights=0 * dropped)) == 0
    alone = step_bound.reward_surprisal(rewards.view(-1, 1))
    assert alone.shape == (12, 1) and alone[8].item() == pytest.approx(math.log(12))
    assert alone[0].item() == pytest.approx(-math.log(5 / 12))
