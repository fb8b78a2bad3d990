"""A user's function that returns something else than its kind is named, and nothing is trained with it."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from capo_exp.core.step import StepDecision
from capo_exp.core.types import Selection, TokenLoss
from capo_exp.training.returned import WrongReturn
from capo_exp.training.rollout_step import Rollout, assign_credit, take_updates
from tests.pieces import groups_of, take_step, weights


def unchecked(kind, **values):
    """An object that the tests' own check of types would not let through."""
    made = object.__new__(kind)
    vars(made).update(values)
    return made


def loss_of(values, clipped=torch.isnan):
    def loss(inputs):
        own = -inputs.log_probs * inputs.advantages
        return unchecked(TokenLoss, values=values(own), clipped=clipped(own))

    return loss


def selection_of(make, weights=None):
    def select(scored):
        return unchecked(
            Selection, keep_mask=make(scored.batch.completion_mask), rejected_by={}, weights=weights
        )

    return select


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("token_loss", lambda inputs: inputs.log_probs, "a tensor of float32 [8, 7]; expected a TokenLoss"),
        ("token_loss", loss_of(Tensor.sum), "a tensor of float32 []; expected a tensor [B, T] = [8, 7]"),
        ("token_loss", loss_of(lambda own: own[:, :1]), "[8, 1]; expected a tensor [B, T] = [8, 7]"),
        ("token_loss", loss_of(Tensor.detach), "expected them to be computed from the log_probs"),
        ("token_loss", loss_of(Tensor.clone, Tensor.clone), "expected a tensor of bool [B, T] = [8, 7]"),
        ("selection", lambda scored: scored.batch.completion_mask, "expected a Selection"),
        ("selection", selection_of(lambda mask: mask[:, :1]), "expected a tensor of bool [B, T] = [8, 7]"),
        ("selection", selection_of(Tensor.float), "expected a tensor of bool [B, T] = [8, 7]"),
        ("selection", selection_of(Tensor.clone, torch.ones(7)), "[7]; expected a tensor [B, T] = [8, 7]"),
        ("aggregation", lambda values, *_: values.sum(1), "[8]; expected a tensor, a scalar"),
        ("kl_estimator", lambda own, _: own.sum(), "[]; expected a tensor [B, T] = [8, 7]"),
        ("step_rule", lambda _: 1.0, "returned float; expected a StepDecision"),
    ],
)  # fmt: skip
def test_a_part_that_returns_something_else_is_named(learner, random_batch, name, part, said):
    ours = learner("algo=grpo", "model.micro_batch_size=8")
    before = weights(ours)
    ours.algorithm = replace(ours.algorithm, kl_coefficient=0.1, **{name: part})
    with pytest.raises(WrongReturn, match=f"algo.{name}.*{re.escape(said)}"):
        take_step(ours, random_batch())
    if name != "step_rule":
        assert all(torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("shaping", lambda rewards, *_: rewards.sum(1), "[1]; expected a tensor [P, G] = [1, 2]"),
        ("advantage", lambda rewards: rewards.mean(1), "[1]; expected a tensor [P, G] = [1, 2]"),
        ("advantage", lambda rewards: rewards.log(), "not all finite; expected finite numbers"),
        ("credit", lambda advantages, *_: advantages, "[2]; expected a tensor [B, T] = [2, 3]"),
        ("credit", lambda advantages, mask, _: mask / 0 * advantages[:, None], "not all finite"),
    ],
)  # fmt: skip
def test_so_is_one_that_makes_credit_of_rewards(learner, name, part, said):
    ours = learner("algo=grpo")
    ours.algorithm = replace(ours.algorithm, **{name: part})
    rollout = Rollout(groups_of([[1.0, 0.0]], [[3, 2]]), torch.tensor([[1.0, 0.0]]), True, 1, 2, 5, {})
    with pytest.raises(WrongReturn, match=f"algo.{name}: tests.test_returned.<lambda> .*{re.escape(said)}"):
        assign_credit(rollout, ours, pad_token_id=0)


def test_rewards_that_are_not_finite_are_no_fault_of_the_advantage(learner):
    rollout = Rollout(groups_of([[1.0, 0.0]], [[3, 2]]), torch.tensor([[1.0, torch.nan]]), True, 1, 2, 5, {})
    batch, _ = assign_credit(rollout, learner("algo=grpo"), pad_token_id=0)
    assert batch.advantages.isnan().any()


def test_a_filter_has_to_leave_a_completion(learner, random_batch):
    ours = learner("algo=grpo")
    ours.algorithm = replace(ours.algorithm, completion_filter=lambda batch: batch.group_ids < 0)
    with pytest.raises(WrongReturn, match=r"algo.completion_filter: .* all of it False; expected at"):
        next(take_updates(ours, random_batch(), step=1))


def test_what_a_step_rule_remembers_can_be_read_from_a_checkpoint(learner, random_batch, tmp_path):
    ours = learner("algo=grpo")
    rule = lambda _: StepDecision(0.5, {"own": np.float64(1)})  # noqa: E731
    ours.algorithm = replace(ours.algorithm, step_rule=rule)
    take_step(ours, random_batch())
    torch.save(ours.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["step_memory"] == {"own": 1.0}


def test_a_selection_of_padding_selects_the_completions(learner, random_batch):
    ours = learner("algo=grpo")
    ours.algorithm = replace(ours.algorithm, selection=selection_of(torch.ones_like))
    metrics, record = take_step(ours, random_batch())
    assert torch.equal(record.selection.keep_mask, record.batch.completion_mask)
    assert metrics["selection/rejection_rate"] == 0
