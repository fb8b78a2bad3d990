"""The optimiser steps of one rollout step; and for every algorithm what must not crash it."""

import pickle
import weakref
from dataclasses import replace
from itertools import chain
from math import isfinite
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from capo_exp.core.batch import WIDE, join_shared, minibatches, narrow
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Batch, RolloutGroup
from capo_exp.runs.metrics import check_known
from capo_exp.training import passes
from capo_exp.training.rollout_step import assign_credit, sample_rollout, take_updates
from capo_exp.training.sampler import remember_reference
from tests.conftest import ALGORITHMS
from tests.pieces import completion, groups_of, run_updates, same_weights, sampler_of, take_step, weights


@pytest.mark.parametrize(
    ("groups", "count", "sizes"),
    [([0, 0, 1, 1], 1, [4]), ([0, 1] * 4, 4, [2] * 4), ([0] * 10, 4, [3, 3, 2, 2]), ([0, 0], 4, [1, 1]),
     ([0, 1, 2, 0, 1, 2, 3, 3], 4, [2] * 4), ([0, 1, 2, 0, 1, 2], 2, [4, 2])],
)  # fmt: skip
def test_minibatches_are_a_partition(groups, count, sizes):
    """Of whole groups where there are as many, since an average over a prompt wants all its completions."""
    group_ids = torch.tensor(groups)
    parts = minibatches(group_ids, count, seed=3)
    assert [len(part) for part in parts] == sizes
    assert sorted(torch.cat(parts).tolist()) == list(range(len(groups)))
    if count <= len(set(groups)):
        of_parts = [set(group_ids[part].tolist()) for part in parts]
        assert sum(map(len, of_parts)) == len(set(groups))
    again = minibatches(group_ids, count, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_one_minibatch_keeps_the_order_and_several_are_drawn_anew():
    alone = torch.arange(40)
    assert minibatches(alone[:5], 1, seed=0)[0].tolist() == list(range(5))
    first, second = ([part.tolist() for part in minibatches(alone, 2, seed)] for seed in (0, 1))
    assert first != second and first[0] != list(range(20))


def rows_of(ours, batch, step=1):
    """The rows and the metrics of each optimiser step."""
    done = list(take_updates(ours, batch, step=step))
    return [u.rows.tolist() for u in done], [u.metrics for u in done]


def test_each_pass_sees_every_row_once_in_another_order(learner, random_batch):
    cut = ["algo=grpo", "algo.num_iterations=2", "algo.num_minibatches=4"]
    ours = learner(*cut)
    rows, metrics = rows_of(ours, random_batch())
    assert [len(part) for part in rows] == [2] * 8
    passes = [[*chain(*rows[:4])], [*chain(*rows[4:])]]
    assert all(sorted(one) == list(range(8)) for one in passes) and passes[0] != passes[1]
    assert [line["counter/optimizer_step"] for line in metrics] == list(range(1, 9))
    assert ours.optimizer_step == 8
    again = [([], 1), ([], 2), (["seed=1"], 1)]
    others = [rows_of(learner(*cut, *seed), random_batch(), step)[0] for seed, step in again]
    assert [one == rows for one in others] == [True, False, False]


@pytest.mark.parametrize(("iterations", "cuts"), [(1, 4), (2, 2)])
def test_old_log_probs_are_those_at_sampling(learner, random_batch, iterations, cuts):
    """The ratio is 1 in the first optimiser step alone; in the last pass it still refers to what sampled."""
    numbers = (f"algo.num_iterations={iterations}", f"algo.num_minibatches={cuts}")
    ours, batch = learner("algo=grpo", *numbers, "regime.learning_rate=1e-3"), random_batch()
    sampled = ours.log_probs(batch)
    done = list(take_updates(ours, batch, step=1))
    ratios = [update.metrics["policy/ratio_max"] for update in done]
    assert len(done) == iterations * cuts and ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(ratio - 1) > 1e-3 for ratio in ratios[1:])
    assert [update.record is not None for update in done] == [False] * (iterations - 1) * cuts + [True] * cuts
    for update in done[-cuts:]:
        assert update.record is not None
        torch.testing.assert_close(update.record.old_log_probs, sampled[update.rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(update.record.batch.input_ids, batch.input_ids[update.rows])


@pytest.mark.parametrize("words", ["algo.num_iterations=2", "selection=m2po", "algo.num_minibatches=2"])
def test_hidden_states_are_gone_when_the_next_ones_are_made(learner, random_batch, monkeypatch, words):
    """Also those of a scoring pass before the gradient; what is kept of an update holds none."""
    ours, seen = learner("algo=grpo", words), []

    def join(*given):
        assert not any(hidden() is not None for hidden in seen)
        joined = join_shared(*given)
        seen.append(weakref.ref(joined.output.hidden))
        return joined

    monkeypatch.setattr(passes, "join_shared", join)
    done = list(take_updates(ours, random_batch(), step=1))
    assert len(seen) == 2
    records = [update.record.output for update in done if update.record is not None]
    assert not any(getattr(output, name).untyped_storage().nbytes() for output in records for name in WIDE)


def test_a_narrow_record_travels_without_its_hidden_states(learner, random_batch):
    """A pickle holds the whole storage of a view."""
    record = take_step(learner("algo=grpo"), random_batch())[1]
    sizes = [len(pickle.dumps(one)) for one in (record, narrow(record))]
    assert sizes[0] - sizes[1] >= record.output.hidden.nbytes > 0


def test_a_minibatch_is_an_optimiser_step_of_its_own(learner, random_batch):
    """Four of two rows = four learner steps on those rows alone, with the old log-probs of the start."""
    cut = ["algo=cpgd", "algo.num_minibatches=4", "regime.learning_rate=1e-3"]
    ours, by_hand, batch = learner(*cut), learner(*cut), random_batch()
    old = by_hand.log_probs(batch)
    for part in rows_of(ours, batch)[0]:
        take_step(by_hand, Batch(*(tensor[part] for tensor in vars(batch).values())), old[part])
    assert same_weights(ours, by_hand)


@pytest.mark.parametrize(("iterations", "cuts"), [(1, 1), (2, 4)])
def test_the_schedule_ends_with_the_last_optimiser_step(learner, random_batch, iterations, cuts):
    """Linear from 1e-3 to 0 over 2 rollout steps: optimiser step k of n runs at (1 - k / n)."""
    ours = learner(
        "algo=grpo", f"algo.num_iterations={iterations}", f"algo.num_minibatches={cuts}", "num_steps=2",
        "optimizer.schedule=linear", "optimizer.warmup_ratio=0.0", "regime.learning_rate=1e-3",
    )  # fmt: skip
    metrics = [line for step in (1, 2) for line in run_updates(ours, random_batch(seed=step), step)[0]]
    total = 2 * iterations * cuts
    expected = [1e-3 * (1 - k / total) for k in range(total)]
    assert [line["optim/learning_rate"] for line in metrics] == pytest.approx(expected)
    assert ours.schedule.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_a_filter_and_minibatches_together(learner, random_batch, denominator):
    """Rows 1, 4 and 6 have an advantage; row 2 is the first of a prompt that has none. A minibatch sees those
    of its share that pass; a share without any is no step. Its loss averages over the 2 rows of the share, or
    over those that pass."""
    batch = random_batch()
    chosen = torch.zeros(8, 1)
    chosen[[1, 4, 6]] = 1.0
    batch = replace(batch, advantages=chosen * batch.completion_mask)
    ours = learner(
        "algo=dash", "algo.num_minibatches=4", "algo.kl_coefficient=0.0",
        f"algo.filter_denominator={denominator}", "regime.learning_rate=0.0",
        "algo.aggregation._target_=capo_exp.algorithms.aggregation.constant_length_mean",
    )  # fmt: skip
    rows, metrics = rows_of(ours, batch)
    assert sorted(chain(*rows)) == [1, 2, 4, 6] and 2 <= len(rows) <= 4 and ours.optimizer_step == len(rows)
    lengths = batch.completion_mask.sum(1) * chosen[:, 0]
    for part, line in zip(rows, metrics, strict=True):
        count = len(part) if denominator == "kept" else 2
        assert line["loss/total"] == pytest.approx(-lengths[part].sum().item() / (96 * count), rel=1e-4)
        assert line["selection/filtered_completion_fraction"] == pytest.approx(4 / 8)


@pytest.mark.parametrize("total", [33, 52])
def test_a_warm_up_is_as_long_as_transformers(learner, total):
    """A tenth of the steps, rounded up: 52 have 6, at 0, 1/6, ... of the rate."""
    numbers = (f"num_steps={total}", "optimizer.schedule=constant_with_warmup", "optimizer.warmup_ratio=0.1")
    ours = learner("algo=grpo", *numbers, "regime.learning_rate=1.0")
    steps = -(-total // 10)
    arguments = cast(TrainingArguments, SimpleNamespace(warmup_steps=0.1))  # a real one asks for accelerate
    assert TrainingArguments.get_warmup_steps(arguments, total) == steps
    for step in range(steps + 1):
        assert ours.learning_rate == pytest.approx(step / steps)
        ours.optimizer.step()
        ours.schedule.step()


EQUAL_WRONG = [[0.0] * 4] * 3
EQUAL_RIGHT = [[1.0] * 4] * 3
MIXED = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
LONG = [[3, 1, 4, 2], [5, 2, 2, 1], [1, 3, 2, 4]]
ONE_TOKEN = [[1] * 4] * 3
CASES = {
    "all wrong, one token, minibatches": (EQUAL_WRONG, ONE_TOKEN, ["algo.num_minibatches=4"]),
    "all right": (EQUAL_RIGHT, LONG, []),
    "one token": (MIXED, ONE_TOKEN, []),
}


class Given:
    """An engine that hands out groups made before."""

    def __init__(self, groups):
        self.groups = groups

    def generate(self, request):
        """What is sampled beside the step's own completions earns a half."""
        if request.group_size == len(self.groups[0].completions):
            return self.groups
        pairs = zip(request.prompts, request.beginnings(), strict=True)
        made = [(p, completion([*ids, 3], reward=0.5)) for p, ids in pairs]
        return [RolloutGroup(p, (one,) * request.group_size, 0) for p, one in made]


def through(learner, algo, rewards, lengths, *extra):
    """A rollout step on given completions through the real pieces; also what it logs."""
    ours = learner(
        f"algo={algo}", "regime.prompts_per_step=3", "regime.group_size=4", "model.micro_batch_size=4",
        "regime.learning_rate=1e-3", *extra, distance=0.01,
    )  # fmt: skip
    sampler = sampler_of(Given(groups_of(rewards, lengths)), 3)
    if ours.algorithm.reference_samples:
        sampler, *_ = remember_reference(ours.config, ours.algorithm, sampler)
    drawn = sample_rollout(
        ours.config, ours.algorithm, sampler, step=1, first=0, weight_version=0, watch=Stopwatch()
    )
    batch, metrics = assign_credit(drawn, ours, pad_token_id=0)
    logged = [drawn.metrics | metrics | line for line in run_updates(ours, batch)[0]]
    for line in logged:
        check_known(line)
        finite = {key for key, value in line.items() if not isfinite(value)}
        assert not finite, finite
    assert all(parameter.isfinite().all() for parameter in weights(ours))
    return ours, drawn, logged, batch


def is_part(part, function):
    return str(part["_target_"]).endswith(f".{function}")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_nothing_crashes_an_algorithm_and_it_is_counted(learner, small_model, algo, case):
    rewards, lengths, extra = CASES[case]
    extra = [*extra, "algo.reference_samples=2"] if algo == "direct_advantage_po" else extra
    ours, drawn, logged, batch = through(learner, algo, rewards, lengths, *extra)
    algorithm, last = ours.algorithm, logged[-1]
    moved = not all(torch.equal(a, b) for a, b in zip(weights(ours), small_model.parameters(), strict=True))
    left = last["selection/rejection_rate"] < 1.0  # most tokens here are outside the support's most probable
    penalised = algorithm.needs_reference
    beside = int(last.get("rollout/states", 0)) * algorithm.continuations
    assert last["reward/accuracy"] == pytest.approx(sum(map(sum, rewards)) / 12)
    assert last["rollout/completion_length/mean"] == pytest.approx(sum(map(sum, lengths)) / 12)
    if rewards is MIXED:
        assert batch.completion_mask.shape == (12, 1)
        assert moved or last["selection/rejection_rate"] > 0  # of the only rows with a reward
    else:
        assert last["advantage/zero_group_fraction"] == 1.0
    if rewards is EQUAL_RIGHT:
        # Without a baseline a reward of 1 is a signal; else only the KL to a reference moves weights.
        penalised = algorithm.kl_coefficient > 0 or algorithm.uses_reward_kl
        assert moved == ((penalised or bool(batch.advantages.any())) and left)
    if is_part(ours.config.algo.group_filter, "mixed_rewards") and rewards is not MIXED:
        assert last["rollout/filtered_group_fraction"] == 1.0
        assert last["rollout/sampling_rounds"] == 10 and drawn.completions == 120
    else:
        assert last["rollout/filtered_group_fraction"] == 0.0 and drawn.completions == 12 + beside
    kept = {"advantage_above": 1, "advantage_above_in_prompt": 3}  # the first of the batch, of each prompt
    filtering = [count for name, count in kept.items() if is_part(ours.config.algo.completion_filter, name)]
    if filtering and not batch.advantages.any():
        dropped = last["selection/filtered_completion_fraction"]
        assert dropped == pytest.approx(1 - filtering[0] / 12)
    elif not filtering:
        assert last["selection/filtered_completion_fraction"] == 0.0


def test_a_rollout_step_in_which_only_one_group_passed(learner):
    """DAPO trains on that group alone: 4 rows."""
    rewards = [EQUAL_WRONG[0], MIXED[0], EQUAL_WRONG[0]]
    _, drawn, logged, batch = through(learner, "dapo", rewards, LONG, "algo.max_sampling_rounds=1")
    assert len(drawn.groups) == 1 and drawn.completions == 12 and len(batch.group_ids) == 4
    assert logged[-1]["rollout/filtered_group_fraction"] == pytest.approx(2 / 3)


def test_an_all_equal_group_teaches_nothing(learner):
    """Its rows have exactly no advantage, also after shaping by a penalty that all pay alike."""
    rewards: list[list[float]] = [[0.1] * 4, MIXED[0], [0.7] * 4]
    same: list[list[int]] = [[3] * 4] * 3
    for algo in ("grpo", "dr_grpo", "rloo", "cpgd", "dapo"):
        extra = ["algo.shaping.kl_coefficient=0.0"] if algo == "rloo" else []
        extra += [
            "algo.max_sampling_rounds=1",
            "algo.group_filter._target_=capo_exp.algorithms.neutral.all_groups",
        ]
        _, _, _, batch = through(learner, algo, rewards, same, *extra, "dataset.max_completion_tokens=3")
        found: Tensor = batch.advantages.view(3, 4, 3)
        assert not found[0].any() and found[1].all() and not found[2].any()
