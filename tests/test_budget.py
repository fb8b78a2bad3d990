"""Rollouts that stop at a budget of tokens and go on in the next step (C3PO++), to the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isnan, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.config.checks import check
from capo_exp.config.memory import sequences_at_once
from capo_exp.config.plan import plan
from capo_exp.core.seeds import ORDER, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Completion, RolloutGroup
from capo_exp.data.prompts import choose_visits
from capo_exp.distributed.world import SINGLE, World
from capo_exp.grading.terms import RewardTerms
from capo_exp.rollout import SamplingRequest
from capo_exp.rollout.vllm import VLLMRollout
from capo_exp.rollout.vllm_process import Response, Sampled
from capo_exp.runs.files import list_checkpoints
from capo_exp.training import loop
from capo_exp.training.rollout_step import sample_rollout, take_rollout_step
from capo_exp.training.sampler import Sampler
from tests.pieces import (
    SMALL,
    Reader,
    assert_same_end,
    even_first,
    logged,
    make_learner,
    prompt,
    run_one_step,
    same_weights,
)
from tests.test_rollout_hf import Tokenizer, engine, prompts

SIZE = (
    "algo=c3po_pp",
    "regime.prompts_per_step=3",
    "regime.group_size=2",
    "dataset.max_completion_tokens=12",
)
QUESTIONS = prompts(*((5 + i, 6, 7)[: 1 + i % 3] for i in range(30)))


@pytest.fixture
def ending(small_model):
    """The small model with an end token that is drawn often: two completions in five are shorter than 12."""
    with torch.no_grad():
        small_model.lm_head.weight[1] *= 6
    return small_model


def steps(config, sampler, version=int):
    """Rollout steps one after another, as a run takes them; `version` of a step is that of the weights."""
    algorithm, drawn, step = build_algorithm(config.algo), 0, 1
    while True:
        got = sample_rollout(
            config,
            algorithm,
            sampler,
            step=step,
            first=drawn,
            weight_version=version(step),
            watch=Stopwatch(),
        )
        yield got
        sampler, drawn, step = replace(sampler, unfinished=got.unfinished), drawn + got.prompts, step + 1


def live(model, **more):
    source = engine(model)
    return Sampler(source, source, Reader(even_first), QUESTIONS, RewardTerms(), **more)


@dataclass
class Lengths:
    """An engine whose completion g of the i-th prompt that it is asked about ends at a given length; its
    tokens are 10 + g, and their log-prob is minus the version of the weights."""

    lengths: Sequence[tuple[int, ...]]
    calls: list[SamplingRequest] = field(default_factory=list)
    known: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def generate(self, request):
        self.calls.append(request)
        groups: list[RolloutGroup] = []
        for asked, begun in zip(request.prompts, request.beginnings(), strict=True):
            ends = self.known.setdefault(asked.problem.id, self.lengths[len(self.known) % len(self.lengths)])
            which = [begun[0] - 10] if begun else range(request.group_size)
            made = [self._complete(request, len(begun), g, ends[g]) for g in which]
            groups.append(RolloutGroup(asked, tuple(made), request.weight_version))
        return groups

    def _complete(self, request, begun, g, end):
        length = min(end, request.max_tokens, begun + (request.new_tokens or 1000))
        scores = (*[nan] * begun, *[-float(request.weight_version)] * (length - begun))
        return Completion((10 + g,) * length, scores, str(float(g)), truncated=length < end)


def scripted(config, *lengths):
    source: Any = Lengths(lengths)
    sampler = Sampler(source, source, Reader(), [prompt(i) for i in range(20)], RewardTerms())
    return steps(config, sampler), source


def shape(got):
    """Tokens of the completions of each group that trains, and then of each that goes on."""
    groups = [*got.groups, *got.unfinished]
    return [tuple(len(one.token_ids) for one in group.completions) for group in groups]


def metric(got, *names):
    return [got.metrics[f"rollout/{name}"] for name in names]


KEPT = ("unfinished_completions", "unfinished_age", "resumed_tokens", "restarted_groups")


def test_a_budget_that_does_not_bind_changes_no_bit(composed, small_model):
    """c3po with the same loss at the sampler, and a budget that holds all: samples, metrics, weights."""
    one = composed(*SMALL, *SIZE, "algo.rollout_tokens=72", "model.micro_batch_size=2")
    other = composed(
        *SMALL, "algo=c3po", *SIZE[1:], "algo.completion_filter.tokens=72", "model.micro_batch_size=2"
    )
    other.algo.token_loss = one.algo.token_loss
    learners = [make_learner(config, small_model) for config in (one, other)]
    for step in (1, 2):
        mine, plain = (
            take_rollout_step(ours, live(ours.model), step=step, first=3 * step - 3, pad_token_id=0)
            for ours in learners
        )
        assert mine.rollout.groups == plain.rollout.groups and not mine.rollout.unfinished
        assert metric(mine.rollout, *KEPT) == [0.0] * 4
        for key, value in plain.metrics.items():
            assert key.startswith("time/") or mine.metrics[key] == value
        for key, value in plain.updates[0].metrics.items():
            assert key.startswith("time/") or mine.updates[0].metrics[key] == value
        assert (mine.rollout.prompts, mine.rollout.tokens) == (plain.rollout.prompts, plain.rollout.tokens)
    assert same_weights(*learners) and not torch.equal(
        learners[0].model.lm_head.weight, small_model.lm_head.weight
    )


def test_shares_by_hand(composed):
    """8 tokens a step for two groups of two, in the places of which come (1, 19), (2, 3), (1, 1), (9, 9). The
    first step: 2 each make 1 2, 2 2; none has ended, so 8 more and the 1 left: 4 each, and 4 to the last."""
    config = composed(
        *SIZE, "regime.prompts_per_step=2", "algo.rollout_tokens=8", "dataset.max_completion_tokens=20"
    )
    check(config)
    run, source = scripted(config, (1, 19), (2, 3), (1, 1), (9, 9))
    one, two, three = islice(run, 3)
    assert shape(one) == [(2, 3), (1, 10)] and (one.prompts, one.completions, one.tokens) == (2, 2, 16)
    assert metric(one, *KEPT) == [1.0, 1.0, 0.0, 0.0]
    assert shape(two) == [(1, 1), (1, 16)] and (two.prompts, two.completions, two.tokens) == (1, 2, 8)
    assert metric(two, *KEPT) == [1.0, 2.0, 0.0, 0.0]
    assert shape(three) == [(1, 19), (6, 6)] and (three.prompts, three.completions, three.tokens) == (
        1,
        2,
        15,
    )
    assert metric(three, *KEPT) == [2.0, 1.0, 17.0, 0.0]
    long = three.groups[0].completions[1]
    assert long.sampler_log_probs == (-1.0,) * 10 + (-2.0,) * 6 + (-3.0,) * 3 and not long.truncated
    assert three.groups[0].weight_version == 1 and three.rewards.tolist() == [[0.0, 1.0]]
    assert len({call.seed for call in source.calls}) == len(source.calls)
    visited = choose_visits(20, first=0, count=4, seed=derive_seed(config.seed, ORDER, 0))
    assert list(source.known) == [str(i) for i in visited]


def test_what_is_too_old_begins_anew(composed):
    """A token a step for (19, 19): kept for one step, it begins again in the third, with the same prompt."""
    numbers = ("regime.prompts_per_step=2", "algo.rollout_tokens=4", "algo.max_age=1")
    run, source = scripted(composed(*SIZE, *numbers), (19, 19), *[(1, 1)] * 9)
    done = list(islice(run, 4))
    assert [shape(got)[1] for got in done] == [(1, 1), (2, 2), (1, 1), (2, 2)]
    assert [got.metrics["rollout/restarted_groups"] for got in done] == [0.0, 0.0, 1.0, 0.0]
    assert [got.unfinished[0].weight_version for got in done] == [1, 1, 3, 3]
    assert [(got.prompts, got.completions) for got in done] == [(2, 2), (1, 2), (1, 2), (1, 2)]
    assert len({got.unfinished[0].visit for got in done}) == 1
    assert len({call.seed for call in source.calls}) == len(source.calls)


def test_what_went_on_is_what_one_uninterrupted_call_samples(composed, ending):
    """Greedy completions: tokens, ends, and the log-prob of each token, none of them NaN; every token is
    counted once, and no prompt is left out."""
    config = composed(*SIZE, "algo.rollout_tokens=13", "algo.max_age=99")
    config.rollout.temperature = 0.0
    whole = engine(ending).generate(
        SamplingRequest(QUESTIONS, 2, 12, 0.0, top_k=0, top_p=1.0, seed=0, weight_version=0)
    )
    expected = {group.prompt.problem.id: group.completions for group in whole}
    done = list(islice(steps(config, live(ending)), 12))
    assert sum(got.metrics["rollout/resumed_tokens"] for got in done) > 0
    seen: list[str] = []
    for group in (group for got in done for group in got.groups):
        seen.append(group.prompt.problem.id)
        for one, other in zip(group.completions, expected[seen[-1]], strict=True):
            assert replace(one, sampler_log_probs=()) == replace(other, sampler_log_probs=())
            assert one.sampler_log_probs == pytest.approx(other.sampler_log_probs, abs=1e-5)
    tokens = sum(sum(lengths) for got in done for lengths in shape(replace(got, unfinished=())))
    tokens += sum(sum(lengths) for lengths in shape(replace(done[-1], groups=[])))
    assert sum(got.tokens for got in done) == tokens
    assert sum(got.completions for got in done) == 2 * len(seen)
    seen += [QUESTIONS[group.visit].problem.id for group in done[-1].unfinished]
    drawn = sum(got.prompts for got in done)
    visited = choose_visits(30, first=0, count=drawn, seed=derive_seed(config.seed, ORDER, 0))
    assert sorted(seen) == sorted(QUESTIONS[i].problem.id for i in visited)


class Both(World):
    """Two processes, one after the other in this one."""

    def together(self, action):
        done = []
        for rank in (1, 0):
            object.__setattr__(self, "rank", rank)
            done.insert(0, action())
        return done

    def first(self, action):
        return action()


def test_two_processes_sample_what_one_does_and_the_budget_is_kept(composed, ending):
    """Sampled, not greedy; what each step leaves is less than a token for each that goes on."""
    cut = ("rollout.chunking=per_micro_batch", "model.micro_batch_size=2", "algo.rollout_tokens=20")
    config = composed(*SIZE, *cut, "algo.max_age=2")
    runs = (islice(steps(config, live(ending, **more)), 8) for more in ({}, {"world": Both(0, 2)}))
    kept = 0.0
    for one, two in zip(*runs, strict=True):
        assert (one.groups, one.unfinished, one.tokens) == (two.groups, two.unfinished, two.tokens)
        going = int(one.metrics["rollout/unfinished_completions"])
        assert 0 <= -one.tokens % 20 < max(1, going) or not going
        assert not any(isnan(x) for g in one.groups for c in g.completions for x in c.sampler_log_probs)
        kept += going
    assert kept > 0


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_had_begun(composed, tmp_path):
    """Ended after its first step, which left completions, it ends in the bits of the whole run."""
    numbers = (
        *SIZE, "logger=files", "num_steps=2", "evaluation.num_problems=1", "evaluation.every=0", "device=cpu",
        "checkpoint.every=1", "dataset.max_completion_tokens=48", "algo.rollout_tokens=60",
        "dataset.source.num_train=50", "dataset.source.num_eval=10",
        "optimizer.warmup_ratio=0",
    )  # fmt: skip
    whole = loop.run(composed(*numbers, f"output_dir={tmp_path / 'whole'}"))
    config = composed(*numbers, f"output_dir={tmp_path / 'ended'}")
    run_one_step(config)
    ended = loop.run(config)
    assert_same_end(whole, ended)
    assert logged(whole / "metrics.jsonl")[1]["rollout/resumed_tokens"] > 0
    last = (list_checkpoints(run)[2] / "trainer_state.pt" for run in (whole, ended))
    left = [torch.load(path)["unfinished"] for path in last]
    scores = [[c.pop("sampler_log_probs") for group in each for c in group["completions"]] for each in left]
    assert left[0] == left[1] != []
    for one, two in zip(*scores, strict=True):
        assert one == pytest.approx(two, rel=0, abs=0, nan_ok=True)


def test_an_engine_of_vllm_is_given_the_share(small_model):
    """As its max_tokens, or what is left of the limit where that is less."""
    asked: list[Any] = []

    def generate(requests):
        asked.extend(requests)
        return [Response([Sampled([7], [-1.0], ["me:0"])], []) for _ in requests]

    fake: Any = SimpleNamespace(
        _synchronise=lambda version: None, _ends=[1], running=lambda: SimpleNamespace(generate=generate),
        _name="me", _tokenizer=Tokenizer(), _world=SINGLE,
    )  # fmt: skip
    fake._to_group = lambda *given: VLLMRollout._to_group(fake, *given)
    request = SamplingRequest(
        QUESTIONS[:3], 1, 9, 1.0, 0, 1.0, 3, 0, begun=[(), (5,) * 4, (5,) * 8], new_tokens=3
    )
    groups = VLLMRollout.generate(fake, request)
    assert [each.params["max_tokens"] for each in asked] == [3, 3, 1]
    assert [len(group.completions[0].token_ids) for group in groups] == [1, 5, 9]


def test_what_goes_with_a_budget(composed):
    """A group filter of one round, and values of states, which are beside the budget."""
    budget = ("algo.rollout_tokens=8", "regime.prompts_per_step=2", "regime.group_size=2")
    filtered = composed("algo=dapo", "algo.max_sampling_rounds=1", *budget)
    check(filtered)
    (got,) = islice(scripted(filtered, (1, 2), (40, 40))[0], 1)
    assert shape(got) == [(1, 2), (2, 2)] and len(got.unfinished) == 1
    valued = composed("algo=vineppo", "algo.continuations=3", "algo.rollout_tokens=8", *budget[1:])
    check(valued)
    source: Any = Lengths([(1, 1, 1)])
    sampler = Sampler(
        source,
        source,
        Reader(),
        [prompt(i) for i in range(9)],
        RewardTerms(),
        spell=lambda ids: ["a"] * len(ids),
    )
    (got,) = islice(steps(valued, sampler), 1)
    assert got.offers["state_values"].shape == (4, 1) and got.tokens == 4 + 2 * 3


def test_the_plan_and_the_memory_say_what_a_budget_means(composed):
    """Half of 96 x 96 tokens; completions that go on fill an engine's call to its limit, groups do not."""
    lines = plan(composed("algo=c3po_pp", "model=tiny"))
    assert lines[1].startswith("12 prompts x 8 = at most 96 completions a step = ")
    assert lines[3] == "460,800 tokens in completions of at most 96 tokens; 6 evaluations of 200"
    assert max(map(len, lines)) <= 80
    narrow = (
        "rollout.engine.max_sequences_per_call=20",
        "rollout.chunking=per_step",
        "evaluation.num_problems=1",
    )
    assert [sequences_at_once(composed(f"algo={name}", *narrow)) for name in ("grpo", "c3po_pp")] == [16, 20]
