"""VinePPO, A*-PO, C3PO, Lite PPO, which sample more than a step's completions or learn from fewer."""

from dataclasses import replace
from math import exp, isnan, log, nan

import pytest
import torch

from capo_exp.algorithms.c3po import within_budget
from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.algorithms.vineppo import step_advantages, whitened_step_advantages
from capo_exp.core.batch import totals
from capo_exp.core.timing import Stopwatch
from capo_exp.training import loop, rollout_step, session
from capo_exp.training.rollout_step import assign_credit, sample_rollout
from capo_exp.training.sampler import remember_reference
from tests.pieces import (
    SMALL,
    Made,
    assert_same_end,
    completion,
    inputs_of,
    make_learner,
    run_one_step,
    sampler_of,
)
from tests.test_methods import off_policy
from tests.test_rollout_hf import ROWS, sample


def going():
    """An engine that goes on with one token; completion g of a prompt, after n tokens, earns n + g."""
    return Made(lambda _, ids, g: completion([*ids, 3], reward=len(ids) + g))


def test_an_engine_goes_on_as_it_would_have(small_model):
    """Greedy completions from any token on are the same; what had begun has no log-prob, but counts."""
    whole = [group.completions[0] for group in sample(small_model, ROWS, temperature=0.0, group_size=1)]
    for cut in ((0, 1, 2, 3), (3, 0, 1, 5)):
        begun = [one.token_ids[: min(t, len(one.token_ids) - 1)] for one, t in zip(whole, cut, strict=True)]
        groups = sample(small_model, ROWS, temperature=0.0, group_size=2, begun=begun, max_sequences=4)
        for one, ids, group in zip(whole, begun, groups, strict=True):
            for got in group.completions:
                assert replace(got, sampler_log_probs=()) == replace(one, sampler_log_probs=())
                assert [isnan(x) for x in got.sampler_log_probs[: len(ids)]] == [True] * len(ids)
                new = slice(len(ids), None)
                assert got.sampler_log_probs[new] == pytest.approx(one.sampler_log_probs[new], abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "starts"),
    [
        (["So", " 3", ".", "5", ".", " Then", "\n", "x", "<end>"], [0, 5, 6]),
        (["a", ".", "\n\n", "B", "<end>"], [0, 2]),
        (["a", ".\n", "B", "c"], [0, 2]),
        (["a", ".", " B"], [0]),  # the last token begins no step
        (["a"], [0]),
    ],
)
def test_steps_begin_at_new_lines_and_sentences(built, texts, starts):
    assert built("vineppo").states(texts) == starts


def test_a_steps_advantage_is_the_value_that_it_adds():
    """V = .5, .75, .25 and R = 1: .25, -.5, .75; V of the prompt alone: R - V; they add up to that."""
    values = torch.tensor([[0.5, nan, 0.75, 0.25, nan], [0.25, nan, nan, nan, nan]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    rewards, kl = torch.tensor([1.0, 0.0]), torch.zeros(2, 5)
    got = step_advantages(rewards, mask, kl, values)
    assert got.tolist() == [[0.25, 0.25, -0.5, 0.75, 0.75], [-0.25, -0.25, -0.25, 0, 0]]
    white = whitened_step_advantages(rewards, mask, kl, values, eps=1e-9)
    assert white[mask].mean().abs() < 1e-6 and white[mask].var(correction=0) == pytest.approx(1)
    assert not white[~mask].any() and torch.equal(white.argsort(1)[0], got.argsort(1)[0])


def test_vineppo_values_its_states_in_one_call_and_counts_them(composed, small_model):
    """Completions of one token each have the prompt for their only state, shared by the group: K = 3
    continuations that earn 0, 1, 2 are worth 1. Cut into four tokens, states of a group are shared, too."""
    numbers = ("regime.prompts_per_step=2", "regime.group_size=2", "algo.continuations=3")
    config = composed(*SMALL, "algo=vineppo", *numbers)
    ours, engine = make_learner(config, small_model), going()
    sampler = sampler_of(engine, 9)
    got = sample_rollout(
        config, ours.algorithm, sampler, step=1, first=0, weight_version=0, watch=Stopwatch()
    )
    assert [len(call.prompts) for call in engine.calls] == [2, 2] and engine.calls[1].group_size == 3
    assert engine.calls[0].seed != engine.calls[1].seed
    assert (got.completions, got.tokens, got.metrics["rollout/states"]) == (4 + 6, 4 + 6, 2)
    assert got.offers["state_values"].tolist() == [[1.0]] * 4
    plain = replace(ours.algorithm, credit=step_advantages)
    ours.algorithm = plain
    assert assign_credit(got, ours, pad_token_id=0)[0].advantages.tolist() == [[-1.0], [0.0]] * 2
    longer = [
        replace(g, completions=(completion([5, 6, 7, 8]), completion([5, 6, 9, 1]))) for g in got.groups
    ]
    values, drawn = rollout_step.value_states(
        config, plain, sampler, longer, step=1, weight_version=0, watch=Stopwatch()
    )
    assert values[:2].nan_to_num(-1).tolist() == [[1.0, 2.0, 3.0, -1.0]] * 2
    assert drawn.tokens == drawn.completions == 3 * 2 * (1 + 1 + 1)  # of 5 6 one state


def test_the_optimal_value_by_hand_and_at_its_limits(built):
    """One of four is right: .5 ln((e^2 + 3) / 4); a large beta gives the mean, a small one the maximum."""
    reference, rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1.0], [0.0]])
    for beta, value in ((0.5, 0.5 * log((exp(2) + 3) / 4)), (1e4, 0.25), (1e-3, 1.0)):
        got = built("a_star_po", f"algo.advantage.beta={beta}").advantage(
            rewards, reference_rewards=reference
        )
        assert got.flatten().tolist() == pytest.approx([1 - value, 0.0], abs=2e-3)
    assert built("a_star_po").group_filter(rewards, reference_rewards=reference).tolist() == [True, False]


def test_a_star_pos_regression_is_the_square(built, random_batch):
    """(beta ln(pi / pi_ref) - A)^2, written plainly, and its gradient."""
    batch, algorithm = random_batch(), built("a_star_po", "algo.token_loss.beta=0.3")
    mask = batch.completion_mask
    log_probs, ref, advantages = off_policy(batch, 0.5)
    inputs = replace(inputs_of(log_probs, log_probs.detach(), advantages, mask), ref_log_probs=ref)
    value = algorithm.aggregation(algorithm.token_loss(inputs).values, mask, batch, totals(batch))
    plain = (0.3 * ((log_probs - ref) * mask).sum(1) - advantages[:, 0]).square().mean()
    torch.testing.assert_close(value, plain)
    got, expected = (torch.autograd.grad(one, log_probs)[0] for one in (value, plain))
    torch.testing.assert_close(got, expected)


def test_the_reference_is_sampled_once_for_what_the_run_visits(composed):
    """3 steps of 2 prompts visit 6 of 9 prompts, 30 steps all of them; the rewards are found again by id."""
    for steps, count in ((3, 6), (30, 9)):
        config = composed("algo=a_star_po", "regime.prompts_per_step=2", f"num_steps={steps}")
        engine, algorithm = going(), build_algorithm(config.algo)
        known, completions, tokens = remember_reference(config, algorithm, sampler_of(engine, 9))
        assert len(engine.calls) == 1 and completions == tokens == 8 * count
        assert list(known.reference_rewards.values()) == [[float(g) for g in range(8)]] * count
        got = sample_rollout(config, algorithm, known, step=1, first=0, weight_version=0, watch=Stopwatch())
        assert got.offers["reference_rewards"].shape == (2, 8)
        assert [p.problem.id for p in got.offers["prompts"]] == [g.prompt.problem.id for g in got.groups]


@pytest.mark.slow
def test_a_checkpoint_keeps_what_the_reference_earned(composed, tmp_path, monkeypatch):
    """A run that is ended after its first step goes on to the same numbers without asking the reference."""
    numbers = (
        "algo=a_star_po", "logger=files", "num_steps=2", "regime.prompts_per_step=2", "regime.group_size=2",
        "evaluation.num_problems=1", "evaluation.every=0", "checkpoint.every=1", "algo.reference_samples=8",
        "dataset.max_completion_tokens=48", "device=cpu", "algo.token_loss.beta=1.0",
        "optimizer.warmup_ratio=0",
    )  # fmt: skip
    whole = loop.run(composed(*numbers, f"output_dir={tmp_path / 'whole'}"))
    config = composed(*numbers, f"output_dir={tmp_path / 'ended'}")
    run_one_step(config)
    monkeypatch.setattr(session, "remember_reference", None)
    assert_same_end(whole, loop.run(config))


def test_c3po_keeps_first_completions_first_until_the_budget_is_spent(built, random_batch):
    """Lengths 3 2 4 1 2 2 of three prompts: in the order 3 4 2 2 1 2 the sums are 3 7 9 11 12 14. With the
    step's own tokens for a budget the loss is the token mean."""
    lengths = torch.tensor([3, 2, 4, 1, 2, 2])
    mask = torch.arange(4) < lengths[:, None]
    batch = replace(
        random_batch(rows=6, length=4), completion_mask=mask, group_ids=torch.tensor([0, 0, 1, 1, 2, 2])
    )
    for tokens, kept in (
        (1, [1, 0, 0, 0, 0, 0]),
        (10, [1, 0, 1, 0, 1, 0]),
        (12, [1, 1, 1, 1, 1, 0]),
        (14, [1] * 6),
    ):
        assert within_budget(batch, tokens=tokens).int().tolist() == kept
    values, keep = torch.randn(6, 4), mask & (torch.arange(4) != 1)
    whole = built("c3po", "algo.completion_filter.tokens=14").aggregation(values, keep, batch, totals(batch))
    torch.testing.assert_close(whole, built("dapo").aggregation(values, keep, batch, totals(batch)))
    half = built("c3po", "algo.completion_filter.tokens=28").aggregation(values, keep, batch, totals(batch))
    torch.testing.assert_close(half, whole / 2)


def test_lite_ppo_has_one_scale_for_all_prompts(built):
    """Rewards 1 0, 1 1, 0 0 have a standard deviation of sqrt(.3); a single group is GRPO's."""
    rewards, advantage = torch.tensor([[1.0, 0], [1, 1], [0, 0]]), built("lite_ppo").advantage
    expected = torch.tensor([[0.5, -0.5], [0, 0], [0, 0]]) / (0.3**0.5 + 1e-4)
    torch.testing.assert_close(advantage(rewards), expected)
    assert torch.equal(advantage(rewards[:1]), built("grpo").advantage(rewards[:1]))
    assert not advantage(rewards[1:2]).any()
