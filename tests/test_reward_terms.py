"""Format and length: what they measure, that they count in training's credit and nowhere else."""

import pytest
import torch

from capo_exp.grading import terms as reward_terms
from capo_exp.grading.terms import RewardTerms, build_terms
from capo_exp.runs.identity import run_id
from capo_exp.runs.metrics import check_known
from capo_exp.training.sampler import total_reward
from tests.test_sampling import draw as sample_step

SIZE = ("regime.prompts_per_step=2", "regime.group_size=2", "model.micro_batch_size=4")


@pytest.mark.parametrize(
    ("text", "think", "box", "both"),
    [
        ("<think>a</think> 5", 1, 0, 0), ("<think>a</think> \\boxed{5}", 1, 1, 1),
        ("  <think>\n\n</think>\n\\boxed{5} ", 1, 1, 1), ("<think>\\boxed{4}</think> 5", 1, 1, 0),
        ("<think>\\boxed{4}</think> \\boxed{5}", 1, 0, 1),
        ("<think>a</think> \\boxed{5} \\boxed{5}", 1, 0, 0), ("<think>a</think>", 0, 0, 0),
        ("<think>a</think> \n", 0, 0, 0), ("a</think> \\boxed{5}", 0, 1, 0),
        ("so <think>a</think> 5", 0, 0, 0), ("<think>a</think> <think>b</think> 5", 0, 0, 0),
        ("</think>a<think> 5", 0, 0, 0), ("\\boxed{5", 0, 0, 0), ("\\boxed{}", 0, 0, 0),
        ("\\boxed{5} \\boxed{6", 0, 0, 0), ("", 0, 0, 0),
    ],
)  # fmt: skip
def test_format(text, think, box, both):
    assert reward_terms.think_then_answer(text) == think
    assert reward_terms.one_box(text) == box
    assert reward_terms.think_then_one_box(text) == both


def test_length():
    """RLSP's exploration is what brevity leaves of 1."""
    assert [reward_terms.brevity(n, max_tokens=10) for n in (0, 4, 10, 12)] == [1.0, 0.6, 0.0, 0.0]
    assert [reward_terms.exploration(n, max_tokens=10) for n in (0, 4, 10, 12)] == [0.0, 0.4, 1.0, 1.0]


def test_total_is_correctness_and_weighted_terms():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    measured = {"reward/format": [1.0, 1.0, 0.0, 0.0], "reward/length": [0.0, 0.5, 0.5, 1.0]}
    terms = RewardTerms(format_weight=0.5, length_weight=-2.0)
    assert total_reward(rewards, measured, terms).tolist() == [[1.5, -0.5], [-1.0, -1.0]]
    assert total_reward(rewards, measured, RewardTerms()) is rewards


def draw(config):
    """Completions of one and two tokens; of odd prompts the first is right."""
    return sample_step(config, lambda i: i % 2 == 1)[0]


LENGTH = (
    "reward.length._target_=capo_exp.grading.terms.brevity",
    "+reward.length.max_tokens=4",
    "reward.format._target_=capo_exp.grading.terms.one_box",
)


def test_terms_count_for_credit_and_accuracy_stays_correctness(composed):
    plain = draw(composed("algo=grpo", *SIZE))
    got = draw(composed("algo=grpo", *SIZE, *LENGTH, "reward.length_weight=4"))
    expected = plain.rewards + 4 * torch.tensor([[0.75, 0.5]] * 2)
    assert torch.allclose(got.rewards, expected)
    assert got.metrics["reward/accuracy"] == plain.metrics["reward/accuracy"] == plain.rewards.mean().item()
    assert got.metrics["reward/length"] == 0.625 and got.metrics["reward/format"] == 0.0
    assert not {"reward/length", "reward/format"} & set(plain.metrics)
    check_known(got.metrics)
    unweighted = draw(composed("algo=grpo", *SIZE, *LENGTH))
    assert torch.equal(unweighted.rewards, plain.rewards) and unweighted.metrics["reward/length"] == 0.625


def test_group_filters_see_correctness_alone(composed):
    """Lengths differ in every group; DAPO still samples until enough groups are right and wrong."""
    config = composed("algo=dapo", *SIZE, *LENGTH, "reward.length_weight=0.4", "algo.max_sampling_rounds=9")
    got = draw(config)
    assert all(int(group.prompt.problem.id) % 2 == 1 for group in got.groups)
    assert got.metrics["rollout/filtered_group_fraction"] > 0
    assert got.metrics["reward/length"] == 0.625  # a mean over rounds, not a sum


def test_neutral_terms_are_none_and_leave_the_identity(composed):
    config = composed("algo=grpo")
    assert build_terms(config.reward) == RewardTerms()
    named = ("reward.length_weight=0.0", "reward.format._target_=capo_exp.grading.terms.no_format")
    assert run_id(composed("algo=grpo", *named)) == run_id(config)
    assert run_id(composed("algo=grpo", *LENGTH)) != run_id(config)
