"""DPO, MDPO and direct advantage optimisation, and the pairs that rollout=pairs makes for them."""

import re
from dataclasses import replace
from math import log

import pytest
import torch
from torch.nn.functional import logsigmoid

from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.config.errors import ConfigError
from capo_exp.core.batch import totals
from capo_exp.core.timing import Stopwatch
from capo_exp.grading.terms import RewardTerms
from capo_exp.rollout.pairs import FILE, PairRollout, read_pairs, write_pairs
from capo_exp.training import loop
from capo_exp.training.pairs import PairBuilder
from capo_exp.training.rollout_step import sample_rollout
from capo_exp.training.sampler import Sampler
from tests.pieces import (
    Made,
    Reader,
    assert_same_end,
    completion,
    gradients,
    inputs_of,
    plain_log_probs,
    prompt,
    run_one_step,
    run_updates,
    with_step,
)

PAIRED = ("rollout=pairs", "regime.group_size=2", "model.micro_batch_size=8")
EVERY_TOKEN = "algo.states.pattern='(?<= )'"  # begins a step


def grouped(batch, rewards, size):
    advantages = torch.tensor(rewards)[:, None] * batch.completion_mask
    return replace(batch, advantages=advantages, group_ids=torch.arange(len(rewards)) // size)


def preference_loss(scores, rewards, beta, gamma=0):
    """The mean over prompts of the mean over pairs, pair by pair; scores and rewards [P, G]."""
    losses = []
    for score, earned in zip(scores, rewards, strict=True):
        size = range(len(earned))
        pairs = [(w, r) for w in size for r in size if earned[w] > earned[r]]
        each = [-logsigmoid(beta * (score[w] - score[r]) - gamma) for w, r in pairs]
        losses.append(torch.stack(each).mean() if each else 0 * score.sum())
    return torch.stack(losses).mean()


REWARDS = [1.0, 0.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.3]


OWN = {
    "dpo": ("algo=dpo", "algo.token_loss.beta=0.7", "algo.kl_coefficient=0.1"),
    "simpo": (
        "algo=mdpo", "algo.token_loss._target_=capo_exp.algorithms.dpo.simpo", "algo.token_loss.beta=2.0",
        "+algo.token_loss.gamma=0.8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [("dpo", 2), ("dpo", 4), ("simpo", 4)])
def test_it_is_the_logistic_loss_of_differences(learner, random_batch, name, size):
    """Of log-ratios, or of mean log-probs without a reference: loss, and gradient of the weights, by autograd
    on the models; micro-batches part the pairs. A KL to the reference on top is still each token's own."""
    batch, rewards = grouped(random_batch(), REWARDS, size), torch.tensor(REWARDS).view(-1, size)
    ours, again = (learner(*OWN[name], "model.micro_batch_size=3", distance=0.05) for _ in range(2))
    log_probs = plain_log_probs(ours.model, batch)
    assert (ours.reference is None) == (name == "simpo")
    if name == "simpo":
        mean = log_probs.sum(1) / batch.completion_mask.sum(1)
        wanted = preference_loss(mean.view(-1, size), rewards, 2.0, 0.8)
    else:
        log_ratio = log_probs - plain_log_probs(ours.reference, batch)
        wanted = preference_loss(log_ratio.sum(1).view(-1, size), rewards, 0.7)
        wanted = wanted + 0.1 * (log_ratio + (-log_ratio).expm1()).sum(1).mean()
    expected = torch.autograd.grad(wanted, list(ours.model.parameters()))
    torch.testing.assert_close(gradients(ours, batch), list(expected), rtol=1e-5, atol=1e-6)
    assert run_updates(again, batch)[0][0]["loss/total"] == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("moved", [0.0, 1e4, -1e4])
def test_dpo_begins_at_log_2_and_stays_finite(built, random_batch, moved):
    """At pi = pi_ref half of beta up for the better one and down for the other; equal ones have no gradient.
    Where the better one is far ahead both are 0, where it is far behind beta times the gap and beta."""
    batch, algorithm = grouped(random_batch(rows=4), [1.0, 0.0, 0.3, 0.3], 2), built("dpo")
    mask, first = batch.completion_mask, torch.zeros(4, 7)
    first[0, 0] = moved
    log_probs = (first - 1).requires_grad_()
    inputs = inputs_of(log_probs, torch.zeros(4, 7), batch.advantages, mask)
    inputs = with_step(replace(inputs, ref_log_probs=torch.full((4, 7), -1.0)), batch.group_ids)
    loss = algorithm.aggregation(algorithm.token_loss(inputs).values, mask, batch, totals(batch))
    loss.backward()
    value, slope = {0.0: (log(2), 0.05), 1e4: (0.0, 0.0), -1e4: (1e3, 0.1)}[moved]
    assert 2 * loss.item() == pytest.approx(value, rel=1e-6)  # one of two prompts has a pair
    assert log_probs.grad is not None
    torch.testing.assert_close(2 * log_probs.grad, torch.tensor([-slope, slope, 0, 0])[:, None] * mask)


def test_direct_advantage_po_by_hand(built):
    """The state is worth 1/2 and the steps 3/4 and 0: A = 1/4 and -1/2, over beta = 1/2. ln(pi / pi_ref) of
    the steps is 0.3 and 0: the squares of -0.2 and 1, halved, and the gradients -0.2 and 1 at every token."""
    algorithm = built("direct_advantage_po", "algo.token_loss.beta=0.5")
    state = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    advantages = algorithm.advantage(torch.tensor([[0.75, 0.0]]), reference_rewards=state)
    assert advantages.tolist() == [[0.25, -0.5]]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_probs = torch.tensor([[-0.9, -0.9, -0.9], [-1.0, 5.0, 5.0]], requires_grad=True)
    inputs = inputs_of(log_probs, torch.zeros(2, 3), advantages.view(2, 1) * mask, mask)
    values = algorithm.token_loss(replace(inputs, ref_log_probs=torch.full((2, 3), -1.0))).values
    sums = (values * mask).sum(1)
    torch.testing.assert_close(sums.detach(), torch.tensor([0.02, 0.5]))
    gradient = torch.autograd.grad(sums.sum(), log_probs)[0]
    torch.testing.assert_close(gradient, torch.tensor([-0.2, 1.0])[:, None] * mask)


class Plain:
    """A tokenizer of one word a token."""

    def decode(self, token_ids, **_):
        return "".join(f"{token} " for token in token_ids)


SCRIPT = {
    (): (((2, 3, 4, 1), 1.0), ((2, 5, 6, 1), 0.0)),
    (2,): (((2, 5, 7, 1), 0.0), ((2, 8, 9, 1), 1.0)),
    (2, 5): (((2, 5, 6, 1), 0.0), ((2, 5, 9, 1), 0.0)),
    (2, 8): (((2, 8, 9, 1), 1.0), ((2, 8, 5, 1), 0.0)),
}
"""The two completions of each state: tokens, and what they earn."""


def build(config):
    source = PairRollout(Plain(), samples=2)
    engine = Made(lambda _, begun, g: completion(SCRIPT[begun][g][0], reward=SCRIPT[begun][g][1]))
    spell = lambda ids: [f"{token} " for token in ids]  # noqa: E731
    sampler = Sampler(engine, engine, Reader(), [prompt(0)], RewardTerms(), spell=spell)
    return sampler, source, PairBuilder(config, build_algorithm(config.algo), sampler, source)


def test_pairs_of_three_levels_by_hand(composed, tmp_path):
    """The wrong solution 2 5 6 could be saved after 2, and no more after 2 5. The step 8 earns half, 5
    nothing. What is known is not sampled again, and a file holds all of it."""
    sampler, _, builder = build(composed("algo=mdpo", *PAIRED, EVERY_TOKEN))
    got = builder.build()
    assert [[*call.beginnings()] for call in sampler.engine.calls] == [[()], [(2,), (2, 5)], [(2, 8)]]
    assert (got.completions, got.tokens) == (8, 8 + 6 + 4 + 4)

    def shown(pair):
        ones = [one.token_ids for one in pair.completions]
        return pair.level, pair.begun, *ones, pair.rewards, pair.state_rewards

    assert [shown(pair) for pair in got.pairs] == [
        ("solution", (), (2, 3, 4, 1), (2, 5, 6, 1), (1.0, 0.0), (1.0, 0.0)),
        ("inference", (2,), (8, 9, 1), (5, 7, 1), (1.0, 0.0), (0.0, 1.0)),
        ("step", (2,), (8,), (5,), (0.5, 0.0), (0.0, 1.0)),
    ]
    assert [len(one.sampler_log_probs) for one in got.pairs[1].completions] == [3, 3]
    assert got.pairs[2].completions[0].text == "8 "
    write_pairs(tmp_path / FILE, got)
    assert read_pairs(tmp_path / FILE) == got and read_pairs(tmp_path / "none") is None


def test_a_solution_that_is_lost_in_its_first_step_gives_no_inference(composed, monkeypatch):
    """Nor a step where both begin with the same one."""
    monkeypatch.setitem(SCRIPT, (2,), SCRIPT[2, 5])
    built = build(composed("algo=mdpo", *PAIRED, EVERY_TOKEN))[2].build()
    assert [pair.level for pair in built.pairs] == ["solution"]


def test_pairs_are_handed_out_with_what_they_earned(composed):
    """Nothing is graded again; the prompt holds what the solution began with; a pair finds its values."""
    config = composed("algo=direct_advantage_po", *PAIRED, EVERY_TOKEN, "regime.prompts_per_step=1")
    sampler, source, builder = build(config)
    known = source.hold(builder.build().pairs, sampler.prompts)
    reader = Reader()
    holding = replace(
        sampler, engine=source, verifier=reader, prompts=source.prompts, reference_rewards=known
    )
    algorithm = build_algorithm(config.algo)
    got = sample_rollout(config, algorithm, holding, step=1, first=0, weight_version=3, watch=Stopwatch())
    (group,) = got.groups
    assert group.prompt.token_ids == (*prompt(0).token_ids, 2) and group.prompt.text.endswith("2 ")
    assert got.rewards.tolist() == [[0.5, 0.0]] and not reader.calls and "reward/accuracy" not in got.metrics
    assert algorithm.advantage(got.rewards, reference_rewards=got.offers["reference_rewards"]).tolist() == [
        [0.0, -0.5]
    ]


@pytest.mark.slow
def test_a_run_that_goes_on_reads_its_pairs(composed, tmp_path, monkeypatch):
    """The same pairs and weights after an end in between; without its pairs, or with others, refused."""
    numbers = (
        "algo=mdpo", *PAIRED, "logger=files", "num_steps=2", "regime.prompts_per_step=3", "device=cpu",
        "evaluation.num_problems=1", "evaluation.every=0", "checkpoint.every=1",
        "dataset.max_completion_tokens=48", "model.micro_batch_size=6", "rollout.train_engine.samples=4",
        "optimizer.warmup_ratio=0",
    )  # fmt: skip
    whole = loop.run(composed(*numbers, f"output_dir={tmp_path / 'whole'}"))
    config = composed(*numbers, f"output_dir={tmp_path / 'ended'}")
    run_one_step(config)
    (ended,) = (tmp_path / "ended").glob("*/*")
    pairs = (ended / FILE).rename(tmp_path / FILE)
    for other in (None, re.sub(r'"rewards": \[1.0', '"rewards": [0.9', pairs.read_text(), count=1)):
        if other is not None:
            assert other != pairs.read_text()
            (ended / FILE).write_text(other)
        with pytest.raises(ConfigError, match="expected the pairs that the run began with"):
            loop.run(config)
    pairs.replace(ended / FILE)
    monkeypatch.setattr(PairBuilder, "build", None)
    assert_same_end(whole, loop.run(config))
    assert (ended / FILE).read_bytes() == (whole / FILE).read_bytes()
