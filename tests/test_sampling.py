"""Sampling a rollout step: rounds, counts, calls, where the data goes on; demonstrations for samples."""

from dataclasses import replace
from math import isnan
from threading import Event

import pytest
import torch

from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.config.errors import ConfigError
from capo_exp.core import policy
from capo_exp.core.seeds import ORDER, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Problem, Prompt
from capo_exp.data.prompts import choose_visits
from capo_exp.grading.terms import RewardTerms, build_terms
from capo_exp.rollout import SamplingRequest
from capo_exp.rollout.demonstrations import DemonstrationRollout
from capo_exp.training import loop as train
from capo_exp.training import rollout_step
from capo_exp.training.rollout_step import Rollout, Sampler, assign_credit, sample_rollout
from tests.pieces import SMALL, Made, Reader, completion, logged, make_learner, prompt, run_updates, weights

SIZE = ("regime.prompts_per_step=4", "regime.group_size=2")


def scripted(mixed):
    """Groups are mixed for the prompts it is told, and all wrong for the others; completion g of a prompt has
    g + 1 tokens."""

    def make(p, _, g):
        reward = float(g == 0 and mixed(int(p.problem.id)))
        return completion([3] * (g + 1), reward=reward, truncated=g == 1)

    return Made(make)


def asked(call):
    return [int(p.problem.id) for p in call.prompts]


def draw(config, mixed, *, step=1, first=0, prompts=1000):
    engine, verifier = scripted(mixed), Reader()
    sampler = Sampler(
        engine, engine, verifier, [prompt(i) for i in range(prompts)], build_terms(config.reward)
    )
    rollout = sample_rollout(
        config, build_algorithm(config.algo), sampler,
        step=step, first=first, weight_version=7, watch=Stopwatch(),
    )  # fmt: skip
    return rollout, engine, verifier


def order(config, count, prompts=1000):
    """The first prompts that training visits."""
    return choose_visits(prompts, first=0, count=count, seed=derive_seed(config.seed, ORDER, 0))


def ids(groups):
    return [int(group.prompt.problem.id) for group in groups]


def test_one_round_without_a_filter(composed):
    config = composed("algo=grpo", *SIZE)
    got, engine, verifier = draw(config, lambda i: i % 2 == 0)
    assert ids(got.groups) == order(config, 4) and len(engine.calls) == 1 and verifier.calls == [4]
    assert got.rewards.tolist() == [[float(i % 2 == 0), 0.0] for i in ids(got.groups)]
    assert (got.prompts, got.completions, got.tokens) == (4, 8, 4 * (1 + 2))
    assert {group.weight_version for group in got.groups} == {7}
    assert got.rewarded
    (call,) = engine.calls
    asked_for = (call.group_size, call.max_tokens, call.temperature, call.top_k, call.top_p)
    assert asked_for == (2, 96, 1.0, 0, 1.0)


def test_rounds_go_on_until_enough_groups_pass(composed):
    """4 a round, in the data's order; the first 4 that pass train, and every prompt drawn counts."""
    config = composed("algo=dapo", *SIZE, "algo.max_sampling_rounds=50")
    got, engine, verifier = draw(config, lambda i: i % 3 == 1)
    drawn = order(config, 200)
    passing = [i for i in drawn if i % 3 == 1][:4]
    rounds = drawn.index(passing[3]) // 4 + 1
    assert ids(got.groups) == passing and got.rewards.tolist() == [[1.0, 0.0]] * 4
    assert 1 < rounds == len(engine.calls) == len(verifier.calls) < 50
    assert [i for call in engine.calls for i in asked(call)] == drawn[: 4 * rounds]
    assert (got.prompts, got.completions, got.tokens) == (4 * rounds, 8 * rounds, 12 * rounds)
    passed = sum(i % 3 == 1 for i in drawn[: 4 * rounds])
    assert passed > 4  # the last round has one too many
    assert got.metrics["rollout/sampling_rounds"] == rounds
    assert got.metrics["rollout/filtered_group_fraction"] == pytest.approx(1 - passed / (4 * rounds))
    # what the verifier said, over all that was sampled: shares are means, counts are sums
    assert got.metrics["reward/accuracy"] == pytest.approx(passed / (8 * rounds))
    assert got.metrics["advantage/zero_group_fraction"] == pytest.approx(1 - passed / (4 * rounds))
    assert got.metrics["reward/timeouts"] == rounds and got.metrics["reward/no_answer_fraction"] == 0.25
    assert got.metrics["rollout/completion_length/mean"] == 1.5
    assert got.metrics["rollout/truncated_fraction"] == 0.5
    assert len({call.seed for call in engine.calls}) == rounds


def test_after_the_last_round_a_step_trains_on_what_passed_or_else_on_that_round(composed):
    config = composed("algo=dapo", *SIZE, "algo.max_sampling_rounds=3")
    lucky = order(config, 12)[6]
    got, engine, _ = draw(config, lambda i: i == lucky)
    assert ids(got.groups) == [lucky] and got.rewards.tolist() == [[1.0, 0.0]]
    assert len(engine.calls) == 3 and got.prompts == 12
    got, engine, _ = draw(config, lambda i: False)
    assert ids(got.groups) == order(config, 12)[8:] == asked(engine.calls[-1]) and not got.rewarded
    assert not got.rewards.any() and got.rewards.shape == (4, 2)
    assert got.metrics["rollout/filtered_group_fraction"] == 1.0


def test_steps_visit_the_data_without_gap_or_repetition(composed):
    """Each step goes on where the rounds of the one before stopped; an epoch of 50 holds each prompt once."""
    config = composed("algo=dapo", *SIZE)
    first, rounds, seen, seeds = 0, [], [], []
    for step in range(1, 12):
        got, engine, _ = draw(config, lambda i: i % 3 == 0, step=step, first=first, prompts=50)
        first += got.prompts
        rounds.append(len(engine.calls))
        seen += [i for call in engine.calls for i in asked(call)]
        seeds += [call.seed for call in engine.calls]
    assert len(set(rounds)) > 1 and first == len(seen) > 100
    assert seen == order(config, first, prompts=50)
    for start in range(0, first - 49, 50):
        assert sorted(seen[start : start + 50]) == list(range(50))
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("chunking", "micro", "sizes"),
    [
        ("per_step", 2, [6]),
        ("per_micro_batch", 4, [2, 2, 2]),
        ("per_micro_batch", 3, [1] * 6),  # less than two groups: one at a time
        ("per_micro_batch", 1, [1] * 6),  # not even one
        ("per_micro_batch", 8, [4, 2]),
        ("per_micro_batch", 96, [6]),
    ],
)
def test_chunks(composed, chunking, micro, sizes):
    config = composed(
        "algo=grpo", "regime.prompts_per_step=6", "regime.group_size=2", f"rollout.chunking={chunking}",
        f"model.micro_batch_size={micro}",
    )  # fmt: skip
    got, engine, verifier = draw(config, lambda i: True)
    assert [len(asked(call)) for call in engine.calls] == sizes
    assert ids(got.groups) == order(config, 6) and verifier.calls == [6]
    again = draw(config, lambda i: True)[1]
    assert [call.seed for call in engine.calls] == [call.seed for call in again.calls]
    others = [draw(config, lambda i: True, step=2)[1], draw(replace(config, seed=1), lambda i: True)[1]]
    seeds = [call.seed for each in (engine, *others) for call in each.calls]
    assert len(set(seeds)) == 3 * len(sizes)


def test_a_call_is_graded_while_the_next_one_samples(composed):
    """The second call waits until the grading of the first has begun, which waits until the second has."""
    config = composed(
        "algo=grpo", "regime.prompts_per_step=6", "regime.group_size=2", "rollout.chunking=per_micro_batch",
        "model.micro_batch_size=8",
    )  # fmt: skip
    grading, begun = Event(), Event()

    class Engine(Made):
        def generate(self, request):
            if self.calls:
                assert grading.wait(60)
                begun.set()
            return super().generate(request)

    class Patient(Reader):
        def score(self, *given, **more):
            grading.set()
            assert begun.wait(60)
            return super().score(*given, **more)

    even, rollouts = scripted(lambda i: i % 2 == 0), list[Rollout]()
    for engine, verifier in ((Engine(even.make), Patient(beside_sampling=True)), (even, Reader())):
        sampler = Sampler(engine, engine, verifier, [prompt(i) for i in range(9)], RewardTerms())
        rollouts.append(
            sample_rollout(
                config, build_algorithm(config.algo), sampler, step=1, first=0, weight_version=0,
                watch=Stopwatch(),
            )
        )  # fmt: skip
    one, other = rollouts
    assert one.groups == other.groups and torch.equal(one.rewards, other.rewards)
    assert one.metrics["reward/accuracy"] == other.metrics["reward/accuracy"] > 0


def test_chunks_of_several_rounds_have_seeds_of_their_own(composed):
    numbers = ("rollout.chunking=per_micro_batch", "model.micro_batch_size=4", "algo.max_sampling_rounds=3")
    _, engine, _ = draw(composed("algo=dapo", *SIZE, *numbers), lambda i: False)
    assert len(engine.calls) == 6 == len({call.seed for call in engine.calls})


def test_row_p_g_of_the_batch_is_completion_g_of_prompt_p(composed, small_model):
    config = composed(*SMALL, "algo=dr_grpo", *SIZE)
    drawn, _, _ = draw(config, lambda i: i % 2 == 0)
    ours = make_learner(config, small_model)
    batch, metrics = assign_credit(drawn, ours, pad_token_id=0)
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.completion_mask.sum(1).tolist() == [1, 2] * 4
    assert batch.truncated.tolist() == [False, True] * 4
    expected = [[0.5, -0.5] if i % 2 == 0 else [0.0, 0.0] for i in ids(drawn.groups)]
    assert batch.advantages[:, 0].view(4, 2).tolist() == expected
    assert batch.advantages[0, 1] == 0  # padding
    assert batch.surprisal.tolist() == pytest.approx(
        [0.6931 * (x[0] != 0) for x in expected for _ in x], abs=1e-4
    )
    assert metrics == {"reward/mean": drawn.rewards.mean().item()}


def test_the_logged_reward_is_the_shaped_one(composed, small_model):
    """Completions of 1 and 2 tokens where 2 are the limit: half of them pay 1."""
    config = composed(*SMALL, "algo=dapo", *SIZE, "dataset.max_completion_tokens=2")
    drawn, _, _ = draw(config, lambda i: True)
    ours = make_learner(config, small_model)
    _, metrics = assign_credit(drawn, ours, pad_token_id=0)
    assert metrics == {"reward/mean": pytest.approx(0.5 - 0.5)} and drawn.metrics["reward/accuracy"] == 0.5


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_prompts_reference_and_optimiser(composed, tmp_path, monkeypatch):
    """ProRL, whose steps draw different numbers of prompts and whose reference moves, stopped in step 4."""
    config = [
        "algo=prorl", "algo.reference_reset_every=2", "algo.optimizer_reset_every=2",
        "algo.kl_coefficient=0.1", "algo.max_sampling_rounds=3", "num_steps=5", "logger=files",
        "regime.prompts_per_step=2", "regime.group_size=4", "regime.learning_rate=1e-4",
        "model.micro_batch_size=4", "checkpoint.every=1",
        "evaluation.every=0", "evaluation.num_problems=2", "dataset.max_completion_tokens=40",
        "dataset.source.num_train=300", "dataset.source.num_eval=10", "optimizer.warmup_ratio=0",
    ]  # fmt: skip
    whole = train.run(composed(*config, f"output_dir={tmp_path / 'whole'}"))
    genuine, calls = rollout_step.sample_rollout, []

    def stopped(*args, **numbers):
        calls.append(numbers["first"])
        if len(calls) == 4:
            raise RuntimeError("the power is gone")
        return genuine(*args, **numbers)

    parts = composed(*config, f"output_dir={tmp_path / 'parts'}")
    monkeypatch.setattr(rollout_step, "sample_rollout", stopped)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train.run(parts)
    directory = train.run(parts)
    expected = logged(whole / "metrics.jsonl")
    assert logged(directory / "metrics.jsonl") == expected and len(expected) == 5
    drawn = [row["counter/prompts"] for row in expected]
    assert calls == [0, *drawn[:3], *drawn[2:4]]
    assert len({row["rollout/sampling_rounds"] for row in expected}) > 1
    assert [row["counter/reference_resets"] for row in expected] == [0, 0, 1, 1, 2]
    assert [row["loss/kl"] == 0 for row in expected] == [True, False, True, False, True]
    for row in expected:
        assert row["counter/completions"] == 4 * row["counter/prompts"]


class Words:
    """A tokenizer of one token a word, with an end-of-sequence token."""

    eos_token_id = 1

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


def ask(*texts, group_size=2):
    prompts = [Prompt(Problem(str(i), "", "", demonstration=t), "", (5, 6)) for i, t in enumerate(texts)]
    return SamplingRequest(prompts, group_size, 4, 1.0, 0, 1.0, seed=0, weight_version=3)


def test_demonstrations_are_the_solutions_with_an_end():
    engine = DemonstrationRollout(Words())
    short, exact, long = engine.generate(ask("7 8", "7 8 9", "7 8 9 10"))
    for group, token_ids, text, truncated in (
        (short, (7, 8, 1), "7 8", False),
        (exact, (7, 8, 9, 1), "7 8 9", False),
        (long, (7, 8, 9, 10), "7 8 9 10", True),
    ):
        assert len(group.completions) == 2 and group.weight_version == 3
        for one in group.completions:
            assert (one.token_ids, one.text, one.truncated) == (token_ids, text, truncated)
            assert len(one.sampler_log_probs) == len(token_ids) and all(map(isnan, one.sampler_log_probs))
    with pytest.raises(ConfigError, match="problem 1 has no demonstration; expected a dataset with worked"):
        engine.generate(ask("7 8", ""))


def test_log_probs_that_nobody_sampled_leave_the_loss_finite(composed, small_model):
    """Two demonstrations: the loss is their cross-entropy and falls; the distance is not a number."""
    config = composed(
        *SMALL, "algo=sft", "rollout=demonstrations", "regime.group_size=1", "regime.learning_rate=1e-2"
    )
    engine = DemonstrationRollout(Words())
    groups = engine.generate(ask("7 8", "9 10 11", group_size=1))
    drawn = Rollout(groups, torch.ones(2, 1), True, 2, 2, 7, {})
    ours = make_learner(config, small_model)
    batch, _ = assign_credit(drawn, ours, pad_token_id=0)
    exact = -policy.log_probs(ours.model, batch, policy.ForwardSettings(1.0, 100, torch.float32))
    losses = [run_updates(ours, batch, step)[0][0] for step in range(10)]
    assert losses[0]["loss/total"] == pytest.approx(exact[batch.completion_mask].mean().item(), rel=1e-4)
    assert losses[-1]["loss/total"] < 0.5 * losses[0]["loss/total"]
    gaps = {key for key, value in losses[0].items() if isnan(value)}
    four = ("kl_k1", "kl_k3", "ratio_max", "beyond_2x_fraction")
    family = {f"mismatch/{part}{name}" for part in ("", "corrected/") for name in four}
    assert gaps == {*family, "policy/sampler_kl_k3"}
    assert losses[0]["mismatch/dropped_fraction"] == 0.0
    assert all(parameter.isfinite().all() for parameter in weights(ours))
