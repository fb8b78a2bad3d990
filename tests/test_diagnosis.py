"""Rejected tokens and the unmasked step: by hand, by autograd, by torch's AdamW; training does not notice."""

import copy
from dataclasses import replace
from math import isnan

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from capo_exp.core.step import StepDecision
from capo_exp.core.types import AdamState, Batch, PolicyOutput, Selection, StepRecord, TokenShifts
from capo_exp.curvature import model as curvature
from capo_exp.curvature.diagnosis import COMPARED, class_metrics
from capo_exp.runs.metrics import check_known
from capo_exp.training import instruments
from tests.pieces import SMALL, make_learner, plain_log_probs, take_step, weights
from tests.test_step_bound import moved

CLASSES = ("kept", "rejected")
CHANGES = tuple(f"{name}_{sign}" for name in CLASSES for sign in ("positive", "negative"))
RANDOM = ("algo=grpo", "selection=random", "algo.selection.rate=0.4")
CAPO = ("algo=capo", "algo.selection.policy_shift_max=1.2e-2", "algo.selection.objective_shift_max=inf")
ALL = ("curvature.calibrate_completions=99", "curvature.calibrate_tokens=9999")


@pytest.fixture
def learner(composed, small_model):
    def make(*overrides, every=1):
        numbers = ("regime.learning_rate=1e-2", f"curvature.diagnose_every={every}")
        return make_learner(composed(*SMALL, *numbers, *overrides), small_model)

    return make


def found(metrics):
    """Those of the diagnosis, without its name."""
    return {k.removeprefix("diagnosis/"): v for k, v in metrics.items() if k.startswith("diagnosis/")}


def others(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("diagnosis/", "time/"))}


def moments(learner):
    """Of the optimiser and of the optimiser model."""
    real = [value for state in learner.optimizer.state.values() for value in state.values()]
    model = learner.optimizer_model
    return real + ([] if model is None else [model.first, model.second, model.slot_of_id])


@pytest.mark.parametrize(
    "overrides",
    [
        (*CAPO, "model.micro_batch_size=3", "optimizer.max_grad_norm=0.1", "optimizer.weight_decay=0.1"),
        (*CAPO, "model.micro_batch_size=3",
         "algo.aggregation._target_=capo_exp.algorithms.aggregation.token_mean_over_kept"),
        (*RANDOM, "curvature.optimizer_model=sgd", "curvature.calibrate_every=2"),
        (*CAPO, "step_rule=calibrated", "algo.step_rule.policy_shift_max=1e-3"),
        (*CAPO, "algo.selection.policy_shift_max=4e-3", "optimizer.schedule=linear",
         "optimizer.warmup_ratio=0.2"),
    ],
)  # fmt: skip
def test_training_does_not_notice(learner, random_batch, overrides):
    """Bit for bit: weights, moments, metrics, random numbers."""
    every = 2
    plain, watched = learner(*overrides, every=0), learner(*overrides, every=every)
    rates = []
    for step in range(4):
        state = torch.random.get_rng_state()
        expected, _ = take_step(plain, random_batch(seed=step))
        metrics, _ = take_step(watched, random_batch(seed=step))
        assert others(metrics) == others(expected)
        for one, other in ((weights(plain), weights(watched)), (moments(plain), moments(watched))):
            assert len(one) == len(other) and all(map(torch.equal, one, other))
        assert torch.equal(state, torch.random.get_rng_state())
        assert not watched.model.training and all(p.grad is None for p in watched.model.parameters())
        due = (step + 1) % every == 0
        assert bool(found(metrics)) == due == ("time/diagnosis_seconds" in metrics)
        assert not found(expected) and "time/diagnosis_seconds" not in expected
        check_known(metrics)
        rates.append(metrics["selection/rejection_rate"])
    assert any(0 < rate < 1 for rate in rates[every - 1 :: every])


def dot(first, second):
    return sum((a.double() * b).sum().item() for a, b in zip(first, second, strict=True))


def similarity(first, second):
    """Cosine, and the first's length over the second's."""
    lengths = dot(first, first) ** 0.5, dot(second, second) ** 0.5
    return dot(first, second) / (lengths[0] * lengths[1]), lengths[0] / lengths[1]


def surrogate(log_probs, old, batch, keep, over_kept):
    """GRPO's loss, from its formula."""
    ratio, credit = (log_probs - old).exp(), batch.advantages
    values = -torch.minimum(ratio * credit, ratio.clamp(0.8, 1.2) * credit) * keep
    return values.sum() / keep.sum() if over_kept else (values.sum(1) / keep.sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize(
    ("step_scale", "size", "over_kept", "old_noise"),
    [(1.0, 96, False, 0.0), (0.3, 3, True, 0.0), (0.3, 3, False, 0.3)],
)
def test_gradients_and_updates_are_those_of_autograd_and_torchs_adamw(
    learner, random_batch, step_scale, size, over_kept, old_noise
):
    """The second step, so that there are moments, clipped; taken whole and shortened by a step rule."""
    mean = "token_mean_over_kept" if over_kept else "sequence_mean"
    ours = learner(
        *RANDOM, *ALL, f"algo.aggregation._target_=capo_exp.algorithms.aggregation.{mean}",
        f"model.micro_batch_size={size}", "optimizer.max_grad_norm=0.3", "optimizer.weight_decay=0.1",
    )  # fmt: skip
    ours.algorithm = replace(ours.algorithm, step_rule=lambda _: StepDecision(step_scale))
    take_step(ours, random_batch(seed=1))
    batch, before = random_batch(), copy.deepcopy(ours.model)
    own = plain_log_probs(before, batch).detach()
    old = own + old_noise * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    state, start = copy.deepcopy(ours.optimizer.state_dict()), weights(ours)
    metrics, record = take_step(ours, batch, old)
    mask, keep = batch.completion_mask, record.selection.keep_mask
    gradients, updates, models = [], [], []
    for kept in (keep, mask):
        model = copy.deepcopy(before)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(copy.deepcopy(state))
        surrogate(plain_log_probs(model, batch), old, batch, kept, over_kept).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        updates.append([p.detach() - s for p, s in zip(model.parameters(), start, strict=True)])
        models.append(model)
    values = found(metrics)
    expected = (*similarity(*gradients), *similarity(*updates))
    assert [metrics[key] for key in COMPARED] == pytest.approx(expected, rel=2e-4)
    assert all(abs(value - 1) > 1e-3 for value in expected) and keep.any() and (mask & ~keep).any()
    with torch.no_grad():
        for model, suffix in ((ours.model, ""), (models[1], "_unmasked")):
            change = plain_log_probs(model, batch) - own
            for name, tokens in (("kept", keep), ("rejected", mask & ~keep)):
                for sign, signed in (("positive", batch.advantages > 0), ("negative", batch.advantages < 0)):
                    mean_change = change[tokens & signed].mean().item()
                    measured = values[f"log_prob_change{suffix}/{name}_{sign}"]
                    assert measured == pytest.approx(mean_change, rel=1e-3, abs=1e-5)
            gain = (batch.advantages * (change.exp() - 1))[mask].mean().item()
            assert values[f"gain{suffix}"] == pytest.approx(gain, rel=1e-3)
            assert values[f"policy_shift{suffix}"] == pytest.approx(moved(before, model, batch), rel=1e-3)
    assert len({round(values[f"log_prob_change{s}/{c}"], 5) for s in ("", "_unmasked") for c in CHANGES}) == 8


def by_hand():
    """Two completions of 4 and 2 tokens; the support is tokens 3 and 5, H = 1."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    ids = torch.tensor([[3, 5, 3, 3], [5, 3, 9, 9]])
    probs = torch.tensor([[0.5, 0.25, 0.2, 0.1], [0.75, 0.4, 1.0, 1.0]])
    support = torch.stack(
        [torch.where(ids == 3, probs, 1 - probs), torch.where(ids == 5, probs, 1 - probs)], 2
    )
    keep = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0]]).bool()
    batch = Batch(
        input_ids=torch.cat([torch.full((2, 1), 2), ids], 1),
        attention_mask=torch.cat([torch.ones(2, 1), mask], 1).long(),
        completion_mask=mask,
        sampler_log_probs=probs.log(),
        advantages=torch.tensor([[2.0, 2.0, 2.0, 0.0], [-1.0, -1.0, 0.0, 0.0]]),
        group_ids=torch.tensor([0, 0]),
        truncated=torch.tensor([False, False]),
        surprisal=torch.zeros(2),
    )
    objective = torch.tensor([[1e-3, -1e-3, 1e-3, 1e-3], [-1e-3, -1e-3, 7.0, 7.0]])
    zeros = torch.zeros_like(probs)
    output = PolicyOutput(
        probs.log(), zeros, support, torch.tensor([3, 5]).expand(2, 4, 2), zeros[..., None] + 2
    )
    shifts = TokenShifts(torch.full_like(probs, 4.0), objective)
    return StepRecord(
        batch, output, probs.log(), mask.float(), zeros, shifts, Selection(keep), torch.zeros_like(mask)
    )


def test_classes_by_hand():
    """Kept: places 0 and 3 of the first row, 0 of the second. Of 6 tokens 4 are a 3, two are a 5."""
    signal = [2 * 0.5, 2 * 0.75, 2 * 0.8, 0.0, 0.25, 0.6]
    expected = {
        "kept/probability": (0.5 + 0.1 + 0.75) / 3, "kept/positive": 1 / 3, "kept/negative": 1 / 3,
        "kept/position": (0 + 1 + 0) / 3, "kept/frequency": (4 + 4 + 2) / 18, "kept/agreement": 1 / 2,
        "kept/momentum": float("nan"),
        "kept/signal_share": (signal[0] + signal[3] + signal[4]) / sum(signal),
        "rejected/probability": (0.25 + 0.2 + 0.4) / 3, "rejected/positive": 2 / 3,
        "rejected/negative": 1 / 3, "rejected/position": (1 / 3 + 2 / 3 + 1) / 3,
        "rejected/frequency": (2 + 4 + 4) / 18, "rejected/agreement": 1 / 3,
        "rejected/momentum": float("nan"),
        "rejected/signal_share": (signal[1] + signal[2] + signal[5]) / sum(signal),
    }  # fmt: skip
    metrics = found(class_metrics(by_hand(), learning_rate=0.1, moments=None))
    assert metrics == pytest.approx(expected, nan_ok=True)


def test_momentum_is_m_f_of_the_moments_alone_over_m_f():
    """H = 1, h = 2: s = <v, Ghat h> with Adam's direction Ghat of the stored moments and a gradient of 0."""
    record, lr, (beta1, beta2), eps = by_hand(), 0.1, (0.9, 0.99), 1e-8
    slots = torch.zeros(40, dtype=torch.int64)
    slots[3], slots[5] = 1, 2
    first, second = torch.tensor([[0.0], [0.3], [-0.1]]), torch.tensor([[0.0], [0.04], [0.5]])
    state = AdamState(slots, first, second, 3, (beta1, beta2), eps)
    direction = beta1 * first[1:, 0] / (1 - beta1**4)
    direction = direction / ((beta2 * second[1:, 0] / (1 - beta2**4)).sqrt() + eps)
    error = torch.nn.functional.one_hot((record.batch.token_ids == 5).long(), 2) - record.output.topk_probs
    alone = 0.5 * lr**2 * ((error * direction * 2).sum(2)) ** 2
    keep = record.selection.keep_mask
    metrics = found(class_metrics(record, learning_rate=lr, moments=state))
    rejected = record.batch.completion_mask & ~keep
    for name, tokens in (("kept", keep), ("rejected", rejected)):
        assert metrics[f"{name}/momentum"] == pytest.approx(alone[tokens].mean().item() / 4.0, rel=1e-4)
    idle = replace(state, first=torch.zeros(3, 1))
    assert found(class_metrics(record, learning_rate=lr, moments=idle))["kept/momentum"] == 0.0


def test_momentum_is_of_the_moments_before_the_step(learner, random_batch):
    ours, batch = learner("algo=grpo"), random_batch()
    first, _ = take_step(ours, random_batch(seed=1))
    assert isnan(first["diagnosis/kept/momentum"])  # there are none yet
    state, mask = ours.optimizer_model, batch.completion_mask
    metrics, record = take_step(ours, batch)
    out = record.output
    alone = curvature.token_shifts(
        out.hidden, out.topk_probs, out.topk_ids, batch.token_ids, torch.zeros(8), 1e-2, state
    ).policy_shift
    expected = alone[mask].sum() / record.shifts.policy_shift[mask].sum()
    assert metrics["diagnosis/kept/momentum"] == pytest.approx(expected.item(), rel=1e-4)


def test_if_nothing_is_rejected_there_is_no_second_step(learner, random_batch):
    ours, plain, passes = learner("algo=grpo"), learner("algo=grpo", every=0), [0, 0]
    for index, one in enumerate((ours, plain)):
        one.model.register_full_backward_hook(lambda *_, i=index: passes.__setitem__(i, passes[i] + 1))
    metrics, _ = take_step(ours, random_batch())
    take_step(plain, random_batch())
    assert passes[0] == passes[1]
    values = found(metrics)
    assert all(metrics[key] == 1.0 for key in COMPARED)
    rejected = {key: value for key, value in values.items() if "rejected" in key}
    assert len(rejected) == 12 and all(map(isnan, rejected.values()))
    assert values["kept/signal_share"] == 1.0
    for key in ("policy_shift", "gain"):
        assert values[key] == values[f"{key}_unmasked"] != 0.0
    for name in CHANGES[:2]:
        assert values[f"log_prob_change/{name}"] == values[f"log_prob_change_unmasked/{name}"] != 0.0


def test_tokens_that_are_only_weighed_down_are_compared_with_whole_ones(learner, random_batch):
    """The step with every token kept is that of the algorithm without a selection."""
    down = ["algo=grpo", "selection=down_weight", "algo.selection.policy_shift_max=1e-7"]
    ours, plain = learner(*down), learner("algo=grpo")
    metrics, whole = (take_step(one, random_batch())[0] for one in (ours, plain))
    assert metrics["selection/rejection_rate"] == 0 and metrics["selection/weight"] < 1
    assert metrics["diagnosis/gradient/cosine"] < 0.9999 and metrics["diagnosis/gradient/norm_ratio"] < 0.99
    assert metrics["diagnosis/policy_shift_unmasked"] == pytest.approx(
        whole["diagnosis/policy_shift"], rel=1e-3
    )
    assert metrics["diagnosis/gain_unmasked"] == pytest.approx(whole["diagnosis/gain"], rel=1e-3)


def test_if_everything_is_rejected_the_unmasked_step_is_still_known(learner, random_batch):
    """First step: no momentum moves the weights; the second is momentum alone."""
    ours = learner("algo=capo", "algo.selection.policy_shift_max=0.0")
    metrics, _ = take_step(ours, random_batch())
    values = found(metrics)
    kept = {key: value for key, value in values.items() if key.startswith("kept/") or "/kept_" in key}
    assert len(kept) == 12 and all(map(isnan, kept.values()))
    assert values["rejected/signal_share"] == 1.0
    assert isnan(values["gradient/cosine"]) and isnan(values["update/cosine"])
    assert values["gradient/norm_ratio"] == values["update/norm_ratio"] == 0.0
    assert values["log_prob_change/rejected_positive"] == values["gain"] == values["policy_shift"] == 0.0
    assert (
        values["log_prob_change_unmasked/rejected_positive"]
        > 0
        > values["log_prob_change_unmasked/rejected_negative"]
    )
    assert values["gain_unmasked"] > 0 and values["policy_shift_unmasked"] > 0
    assert not any(p.any() for s in ours.optimizer.state.values() for k, p in s.items() if k != "step")


def test_a_failure_on_the_way_leaves_the_learner_as_it_was(learner, random_batch, monkeypatch):
    """Such as a lack of memory while the unmasked step is looked at."""
    ours = learner(*RANDOM)
    before = weights(ours)
    monkeypatch.setattr(instruments, "policy_move", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take_step(ours, random_batch())
    assert all(map(torch.equal, before, weights(ours))) and not ours.optimizer.state
