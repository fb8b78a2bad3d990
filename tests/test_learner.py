"""One optimiser step: micro-batches, order, selection and the equivalences that define CAPO."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from capo_exp.core.batch import collate
from capo_exp.core.policy import last_layer
from capo_exp.core.types import Batch, TokenLoss, TokenLossInput
from capo_exp.curvature import model as curvature
from capo_exp.training.completions import tabulate_completions
from capo_exp.training.optimizer_step import TrainingDiverged
from capo_exp.training.rollout_step import Rollout, Update
from tests.conftest import DISTINCT
from tests.pieces import (
    gradients,
    groups_of,
    plain_log_probs,
    same_weights,
    take_step,
    weights,
    without_clock,
)

MOVING = ("regime.learning_rate=1e-2", "optimizer.eps=1e-3")
"""Weights that move by far more than rounding; a gradient of about 0 has no sign that Adam would follow."""
HALF = ("algo.selection.policy_shift_max=0.017", "algo.selection.objective_shift_max=0.3")
"""Of the tokens, at that rate."""
TIGHT = ["algo.selection.policy_shift_max=1e-7", "algo.selection.objective_shift_min=-2e-4"]
WEIGHED = "grpo selection=down_weight algo.selection.policy_shift_max=1e-7"


def steps(learner, batches):
    results = [take_step(learner, batch) for batch in batches]
    return [without_clock(metrics) for metrics, _ in results], results[-1][1]


@pytest.mark.parametrize("algo", [*DISTINCT, "capo", "dr_capo", "rein_capo", "stapo", "m2po", WEIGHED])
def test_one_batch_equals_four_micro_batches(learner, random_batch, algo):
    bounds = HALF if "capo" in algo else HALF[:1] if algo == WEIGHED else ()
    whole, cut = (
        learner(*f"algo={algo}".split(), f"model.micro_batch_size={size}", *MOVING, *bounds)
        for size in (96, 2)
    )
    batches = [random_batch(seed=seed) for seed in range(2)]
    (first, record), (second, same) = steps(whole, batches), steps(cut, batches)
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-6)
    assert torch.equal(record.selection.keep_mask, same.selection.keep_mask)
    torch.testing.assert_close(weights(whole), weights(cut), rtol=1e-3, atol=1e-4)
    assert all(0 < row["selection/rejection_rate"] < 1 for row in first) or "capo" not in algo


@pytest.mark.parametrize("selection", ["capo", "completion"])  # the second with a scoring pass
@pytest.mark.parametrize(
    "cut",
    [["max_tokens_per_micro_batch=30"], ["max_tokens_per_micro_batch=30", "pack=true"],
     ["max_tokens_per_micro_batch=30", "share_prompts=true"], ["pack=true", "gradient_checkpointing=true"]],
)  # fmt: skip
def test_no_padding_is_the_padded_gradient(learner, random_batch, cut, selection):
    chosen = (f"algo={'capo' if selection == 'capo' else 'grpo'}", f"selection={selection}")
    padded, ours = learner(*chosen), learner(*chosen, *(f"model.{each}" for each in cut))
    batch = random_batch()
    for tensor in (batch.input_ids, batch.attention_mask):
        tensor[1::2, :5] = tensor[::2, :5]  # rows 2 i and 2 i + 1 are a group
    one, other = (gradients(each, batch) for each in (padded, ours))
    padding, left = (take_step(each, batch)[0]["time/padding_fraction"] for each in (padded, ours))
    error = sum((a - b).square().sum() for a, b in zip(one, other, strict=True))
    assert error.sqrt() < 1e-6 * sum(each.square().sum() for each in one).sqrt()
    assert left == 0 if "pack=true" in cut else 0 < left < padding


@pytest.mark.parametrize(("kl", "passes"), [(0.0, 2), (0.1, 4)])  # a penalty has a gradient everywhere
def test_micro_batches_that_move_no_weight_take_no_backward_pass(learner, random_batch, kl, passes):
    chosen, counted = ["algo=grpo", f"algo.kl_coefficient={kl}", *MOVING], []
    whole, cut = (learner(*chosen, f"model.micro_batch_size={n}", distance=0.1) for n in (96, 2))
    last_layer(cut.model).register_full_backward_hook(lambda *_: counted.append(1))
    batch = random_batch()
    batch.advantages[[0, 1, 4, 5]] = 0.0
    for one, other in zip(gradients(whole, batch), gradients(cut, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert len(counted) == passes
    before = weights(cut)
    for each in (whole, cut):
        take_step(each, replace(batch, advantages=torch.zeros_like(batch.advantages)))
    torch.testing.assert_close(weights(whole), weights(cut), rtol=1e-3, atol=1e-4)
    assert not torch.equal(before[0], weights(cut)[0])  # without any gradient, the momentum goes on
    assert len(counted) == (3 if kl == 0 else 8)


def test_weighing_down_scales_the_credit(learner, random_batch):
    """A token's weight is a smaller advantage, in the loss and in the moments of the optimiser model."""
    down = f"algo={WEIGHED}".split()
    one, base, batches = learner(*down), learner("algo=grpo"), [random_batch(seed=seed) for seed in range(2)]
    metrics, record = take_step(one, batches[0])
    assert metrics["selection/rejection_rate"] == 0 and 0 < metrics["selection/weight"] < 0.95
    assert record.selection.weights is not None and (record.selection.weights < 1).any()
    credited = replace(batches[0], advantages=record.selection.weighed(record.batch.advantages))
    by_hand, _ = take_step(base, credited)
    assert metrics["loss/total"] == pytest.approx(by_hand["loss/total"], rel=1e-5, abs=1e-9)
    assert metrics["policy/grad_norm"] == pytest.approx(by_hand["policy/grad_norm"], rel=1e-4)
    torch.testing.assert_close(weights(one), weights(base))
    mine, others = one.optimizer_model, base.optimizer_model
    assert mine is not None and others is not None
    torch.testing.assert_close(mine.first, others.first)
    off = [f"algo.selection.{key}=inf" for key in ("policy_shift_max", "objective_shift_max")]
    free, plain = learner(*down[:2], *off), learner("algo=grpo")
    assert steps(free, batches)[0] == steps(plain, batches)[0] and same_weights(free, plain)


def test_the_order_of_rows_and_extra_padding_change_nothing(learner, random_batch):
    batch = random_batch()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = Batch(*(tensor[order] for tensor in vars(batch).values()))
    pad = lambda tensor, left, right: torch.nn.functional.pad(tensor, (left, right))  # noqa: E731
    padded = Batch(
        pad(batch.input_ids, 3, 2), pad(batch.attention_mask, 3, 2),
        pad(batch.completion_mask, 0, 2), pad(batch.sampler_log_probs, 0, 2), pad(batch.advantages, 0, 2),
        batch.group_ids, batch.truncated, batch.surprisal,
    )  # fmt: skip
    plain, *others = (learner("algo=capo", *MOVING, *HALF) for _ in range(3))
    (expected,), record = steps(plain, [batch])
    for other, changed in zip(others, (shuffled, padded), strict=True):
        (metrics,), _ = steps(other, [changed])
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)
        torch.testing.assert_close(weights(other), weights(plain), rtol=1e-3, atol=1e-4)
    assert 0 < record.selection.keep_mask.sum() < batch.completion_mask.sum()


def test_a_checkpoints_table_is_a_copy_of_the_rows_alone(learner, random_batch):
    """The run's own goes on in place, in a storage with room to grow."""
    one = learner("algo=grpo", "curvature.moments_dtype=bfloat16")
    for seed in range(2):
        take_step(one, random_batch(seed=seed))
    saved = one.state_dict()["optimizer_model"]["first"]
    kept = saved.clone()
    assert saved.dtype == torch.bfloat16 and saved.untyped_storage().nbytes() == saved.nbytes
    take_step(one, random_batch(seed=2))
    assert torch.equal(saved, kept) and one.optimizer_model is not None
    assert not torch.equal(one.optimizer_model.first[: len(kept)], kept)


def test_the_step_is_adamws_on_the_loss_of_the_formula(learner, random_batch, small_model):
    """GRPO from scratch: full logits, F.cross_entropy, torch.optim.AdamW."""
    batch, model = random_batch(), copy.deepcopy(small_model)
    log_probs = plain_log_probs(model, batch, 0.7)
    values = -batch.advantages * (log_probs - log_probs.detach()).exp()
    loss = (values.sum(1) / batch.completion_mask.sum(1)).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0).step()
    ours = learner("algo=grpo", *MOVING, "rollout.temperature=0.7", "optimizer.max_grad_norm=1.0")
    metrics, _ = take_step(ours, batch)
    assert metrics["loss/total"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > 1
    torch.testing.assert_close(weights(ours), [p.detach() for p in model.parameters()], rtol=1e-4, atol=3e-5)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(learner, random_batch):
    ours = learner("algo=grpo")
    before = weights(ours)
    batch = replace(random_batch(), advantages=torch.full((8, 7), float("inf")))
    with pytest.raises(TrainingDiverged, match=r"optimizer step 1: not finite: .*loss/total="):
        take_step(ours, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))
    assert ours.optimizer_step == 0


def test_gradient_checkpointing_changes_no_number(learner, random_batch):
    plain, saving = learner("algo=grpo"), learner("algo=grpo", "model.gradient_checkpointing=true")
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    passes: list[int] = []
    saving.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    expected, metrics = (take_step(one, random_batch())[0] for one in (plain, saving))
    assert metrics["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-5)
    assert len(passes) == 2 and not saving.model.training


def test_the_learner_uses_the_curvature_model_of_this_step(learner, random_batch):
    """Shifts with the moments and the rate from before the step; moments after it from the kept tokens."""
    schedule = ["optimizer.schedule=linear", "optimizer.warmup_ratio=0.5", "regime.learning_rate=1e-4"]
    ours = learner("algo=capo", "model.micro_batch_size=3", *schedule, *TIGHT)
    rates = []
    for seed in range(4):
        batch, state = random_batch(seed=seed), curvature.copy_moments(ours.optimizer_model)
        metrics, record = take_step(ours, batch)
        rates.append(metrics["optim/learning_rate"])
        out, mask = record.output, batch.completion_mask
        tokens = (out.hidden, out.topk_probs, out.topk_ids, batch.token_ids, batch.advantages)
        expected = curvature.token_shifts(*tokens, rates[-1], state)
        torch.testing.assert_close(record.shifts.policy_shift[mask], expected.policy_shift[mask])
        torch.testing.assert_close(record.shifts.objective_shift[mask], expected.objective_shift[mask])
        after = curvature.update_adam_state(state, *tokens, record.selection.keep_mask)
        torch.testing.assert_close(ours.optimizer_model.second, after.second)
    assert rates == pytest.approx([0.0, 2e-5, 4e-5, 6e-5])
    assert learner("curvature.optimizer_model=sgd").optimizer_model is None


def test_the_gradient_is_clipped(learner, random_batch):
    """Adam's first step hides the gradient's length; the moments do not."""
    ours = learner("algo=grpo", "optimizer.max_grad_norm=0.01")
    assert take_step(ours, random_batch())[0]["policy/grad_norm"] > 0.1
    first = [state["exp_avg"] for state in ours.optimizer.state.values()]
    assert torch.cat([m.flatten() for m in first]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_token_loss_sees_the_samplers_log_probs_and_the_entropy(learner, random_batch):
    """Of its own rows, in micro-batches, too; the old log-probs are the learner's."""
    ours, batch, seen = (
        learner("algo=grpo", "model.micro_batch_size=3"),
        random_batch(),
        list[TokenLossInput](),
    )
    batch = replace(batch, sampler_log_probs=-torch.rand(8, 7) * batch.completion_mask)

    def look(inputs):
        seen.append(inputs)
        return TokenLoss(-inputs.advantages * inputs.log_probs, torch.zeros_like(inputs.completion_mask))

    ours.algorithm = replace(ours.algorithm, token_loss=look)
    before = ours.log_probs(batch)
    _, record = take_step(ours, batch)
    assert len(seen) == 3
    for name, whole in (
        ("sampler_log_probs", batch.sampler_log_probs), ("old_log_probs", before),
        ("entropy", record.output.entropy),
    ):  # fmt: skip
        found = torch.cat([getattr(inputs, name)[inputs.completion_mask] for inputs in seen]).sort().values
        torch.testing.assert_close(found, whole[batch.completion_mask].sort().values, rtol=1e-4, atol=1e-5)


def test_a_kept_completion_has_the_mean_advantage_of_its_tokens(learner):
    groups = groups_of([[1.0, 0.0]], [[3, 2]])
    batch = collate(groups, pad_token_id=0, device=torch.device("cpu"))
    batch = replace(batch, advantages=torch.tensor([[1.0, 2.0, 6.0], [-4.0, 0.0, 0.0]]))
    _, record = take_step(learner(), batch)

    class Numbers:
        decode = str

    tokenizer: Any = Numbers()
    rollout = Rollout(groups, torch.tensor([[1.0, 0.0]]), True, 1, 2, 5, {})
    rows = tabulate_completions(rollout, batch, [Update(torch.arange(2), {}, record)], 1, tokenizer)
    assert [row["advantage"] for row in rows] == [3.0, -2.0]
