"""The loop on the shipped model: what a run leaves behind, determinism, resume rules, and learning itself."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.grading import GradingFailed
from capo_exp.rollout import EngineFailed
from capo_exp.runs.identity import run_dir
from capo_exp.runs.metrics import check_known
from capo_exp.runs.read import load_run, read_series, to_its_end
from capo_exp.runs.record import run_status
from capo_exp.training import loop as train
from capo_exp.training import rollout_step
from capo_exp.training.learner import Learner
from capo_exp.training.optimizer_step import TrainingDiverged
from capo_exp.training.session import Session
from tests.pieces import logged, run_one_step

SMALL = [
    "logger=files", "num_steps=3", "regime.prompts_per_step=3", "regime.group_size=4",
    "evaluation.num_problems=6", "dataset.max_completion_tokens=16", "checkpoint.every=2",
    "logger.completions_every=2", "evaluation.every=2", "dataset.source.num_train=64",
    "dataset.source.num_eval=8",
]  # fmt: skip


@pytest.fixture
def small(composed, tmp_path):
    return lambda *overrides: composed(*SMALL, f"output_dir={tmp_path}", *overrides)


@pytest.fixture(scope="module")
def whole(composed, tmp_path_factory):
    """The directory of `small()`, run to its end off the main thread; nobody writes into it."""
    config = composed(*SMALL, f"output_dir={tmp_path_factory.mktemp('whole')}")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(train.run, config).result()


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, where `small()` looks for its run."""
    return Path(shutil.copytree(whole, tmp_path / whole.parent.name / whole.name))


CONTRACT = [
    "counter/optimizer_step", "counter/completions", "counter/generated_tokens", "reward/accuracy",
    "reward/mean", "advantage/std", "loss/total", "loss/clip_fraction", "policy/entropy",
    "policy/grad_norm", "policy/sampler_kl_k3", "mismatch/kl_k1", "mismatch/kl_k3",
    "mismatch/ratio_max", "mismatch/beyond_2x_fraction", "mismatch/corrected/kl_k1",
    "mismatch/corrected/kl_k3", "mismatch/corrected/ratio_max", "mismatch/corrected/beyond_2x_fraction",
    "mismatch/dropped_fraction", "rollout/completion_length/mean", "rollout/truncated_fraction",
    "curvature/token/policy_shift/mean", "curvature/token/policy_shift/p99",
    "curvature/token/policy_shift/max", "curvature/token/objective_shift/mean",
    "curvature/token/objective_shift/p99", "curvature/token/objective_shift/max",
    "curvature/batch/policy_shift", "curvature/batch/objective_shift", "selection/rejection_rate",
    "selection/rejection_rate_policy", "selection/rejection_rate_objective", "optim/learning_rate",
    "time/rollout_seconds", "time/reward_seconds", "time/policy_seconds", "time/curvature_seconds",
    "time/update_seconds", "time/total_seconds",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["counter/rollout_step"] for row in rows] == [1, 2, 3]
    assert [row["counter/completions"] for row in rows] == [12, 24, 36]
    assert set(CONTRACT) <= set(rows[-1])
    check_known(rows[-1])
    assert rows[-1]["mismatch/kl_k3"] < 1e-6  # the sampler is the learner
    assert [row["counter/rollout_step"] for row in logged(whole / "eval.jsonl")] == [0, 2, 3]
    assert json.loads((whole / "run.json").read_text())["status"] == "finished"
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    table = pq.read_table(whole / "completions" / "step_000002.parquet").to_pylist()
    assert len(table) == 12
    for row in table:
        of_tokens = ("token_ids", "tokens", "log_prob", "policy_shift", "objective_shift", "keep")
        assert len({len(row[key]) for key in of_tokens}) == 1
        assert "".join(row["tokens"]).startswith(row["completion"])  # then special tokens
        assert all(value <= 0 for value in row["log_prob"])


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_unless_asked(finished, small):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train.run(small()) == finished
    assert (finished / "metrics.jsonl").read_bytes() == before
    train.run(small("overwrite=true"))
    assert (finished / "metrics.jsonl").read_bytes() != before  # the clock's values differ
    assert len(logged(finished / "metrics.jsonl")) == 3


def test_a_run_does_not_go_on_with_other_problems(finished, small):
    record = json.loads((finished / "run.json").read_text())
    changed = record | {"status": "interrupted", "data": "0123456789abcdef"}
    (finished / "run.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"began with other problems \(0123456789abcdef\).*overwrite=true"):
        train.run(small())


@pytest.mark.slow
def test_a_run_goes_on_in_the_precision_that_it_began_with(finished, small):
    """Whatever `auto` is on this machine."""
    record, row = (finished / "run.json").read_text(), logged(finished / "metrics.jsonl")[-1]
    for dtype, same in (("float16 is none", True), ("bfloat16", False)):
        shutil.rmtree(finished / "checkpoints" / "step_000003")
        changed = {"status": "interrupted", "compute_dtype": dtype}
        (finished / "run.json").write_text(json.dumps(json.loads(record) | changed))
        train.run(small())
        assert json.loads((finished / "run.json").read_text())["compute_dtype"] == (
            "float32" if same else dtype
        )
        assert (logged(finished / "metrics.jsonl")[-1] == row) == same


@pytest.mark.slow
def test_inner_iterations_are_one_line_each(small):
    config = small("algo=grpo", "algo.num_iterations=3", "dataset.max_completion_tokens=64")
    rows = logged(train.run(config) / "metrics.jsonl")
    assert [row["counter/optimizer_step"] for row in rows] == list(range(1, 10))
    assert [row["counter/rollout_step"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    # The ratio's denominator stays that of the weights that sampled.
    assert max(row["mismatch/kl_k3"] for row in rows) < 1e-6
    assert rows[3]["policy/ratio_max"] == 1.0 < rows[4]["policy/ratio_max"]


def test_a_bad_input_leaves_no_directory(composed, tmp_path):
    for said, *wrong in (
        ("nowhere", "dataset=math", "dataset.path=./nowhere"),
        ("nowhere", "model.path=./nowhere"),
        ("aime24 is to evaluate on", "dataset=aime24", "dataset.max_completion_tokens=64"),
    ):
        with pytest.raises(ConfigError, match=said):
            train.run(composed("logger=files", f"output_dir={tmp_path}", *wrong))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("failure", [EngineFailed, GradingFailed])
def test_an_evaluation_that_the_engine_or_the_verifier_failed_in_is_made_up_for(
    whole, small, monkeypatch, failure
):
    """Before the first step, in between and after the last: the run goes on to what an unbroken one has."""
    calls, evaluate = [], train.evaluate_policy

    def fails_first(*args, **kwargs):
        calls.append(len(calls))
        if calls[-1] % 2 == 0:
            raise failure("vLLM: sampling for 6 prompts: its process ended with exit code -9")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate_policy", fails_first)
    for kept in ("nothing was trained yet", "step 2 is saved", "step 3 is saved"):
        with pytest.raises(failure, match=f"exit code -9\n{kept}; the same command goes on from there"):
            train.run(small())
    directory = train.run(small())
    assert logged(directory / "eval.jsonl") == logged(whole / "eval.jsonl")
    assert logged(directory / "metrics.jsonl") == logged(whole / "metrics.jsonl")
    assert run_status(directory) == "finished"


@pytest.mark.slow
def test_what_fails_right_after_a_resume_leaves_the_checkpoint_alone(small, monkeypatch):
    """To write it again would remove it first."""
    config = small("checkpoint.every=1")
    run_one_step(config)

    def fails(*_, **__):
        raise EngineFailed("vLLM: it did not start")

    monkeypatch.setattr(rollout_step, "sample_rollout", fails)
    monkeypatch.setattr(Session, "save", fails)
    with pytest.raises(EngineFailed, match="did not start\nstep 1 is saved"):
        train.run(config)


@pytest.mark.slow
def test_a_run_without_any_reward_ends_early(small, monkeypatch):
    """Also if the engine fails on the way; figures see the steps that were left out."""
    config = small("algo=grpo", "num_steps=9", "stop_after_unrewarded=3", "dataset.max_completion_tokens=1")
    calls, draw = [], rollout_step.sample_rollout

    def fails_once(*args, **kwargs):
        calls.append(len(calls))
        if calls[-1] == 2:
            raise EngineFailed("vLLM: its process ended with exit code -9")
        return draw(*args, **kwargs)

    monkeypatch.setattr(rollout_step, "sample_rollout", fails_once)
    with pytest.raises(EngineFailed, match="step 2 is saved"):
        train.run(config)
    run = load_run(train.run(config))
    assert [row["counter/unrewarded_steps"] for row in run.metrics] == [1, 2, 3]
    assert [row["counter/rollout_step"] for row in run.evaluations] == [0, 2, 3]
    assert run_status(run.path) == "finished" and len(calls) == 4
    assert train.run(config) == run.path and len(calls) == 4
    whole = to_its_end(run)
    x, accuracy = read_series(whole.metrics, "reward/accuracy")
    assert x.tolist() == [12 * step for step in range(1, 10)] and not accuracy.any()
    assert [row["counter/completions"] for row in whole.evaluations] == [0, 24, 36, 108]
    assert to_its_end(whole).metrics == whole.metrics
    unfinished = replace(run, record={**run.record, "status": "interrupted"})
    assert to_its_end(unfinished) is unfinished


@pytest.mark.slow
def test_a_reward_starts_the_count_again_and_what_a_penalty_can_bring_back_is_not_given_up(
    small, monkeypatch
):
    draw, rewarded = rollout_step.sample_rollout, iter([False, True, False, False])
    monkeypatch.setattr(
        rollout_step, "sample_rollout", lambda *a, **k: replace(draw(*a, **k), rewarded=next(rewarded))
    )
    run = load_run(train.run(small("algo=grpo_kl", "stop_after_unrewarded=1", "num_steps=4")))
    assert [row["counter/unrewarded_steps"] for row in run.metrics] == [1, 0, 1, 2]


def test_weights_that_are_not_finite_are_never_saved(small, monkeypatch):
    genuine = Learner.apply

    def apply(self, *args):
        metrics = genuine(self, *args)
        next(iter(self.model.parameters())).data[0] = float("nan")
        return metrics

    monkeypatch.setattr(Learner, "apply", apply)
    config = small("algo=grpo", "checkpoint.every=1")
    with pytest.raises(TrainingDiverged, match="weights after step 1 are not finite; the same command would"):
        train.run(config)
    assert not list((run_dir(config) / "checkpoints").iterdir())


def test_gpu_memory_that_runs_out_names_the_keys(small, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(rollout_step, "assign_credit", full)
    with pytest.raises(RunFailed, match=r"Tried to allocate 2 GiB. Lower model.micro_batch_size, ") as failed:
        train.run(small())
    assert "gpu_memory_utilization" in str(failed.value) and "more" not in str(failed.value).split()[:12]


@pytest.mark.slow
def test_divergence_names_the_step_and_a_checkpoint_from_before_the_trouble(small, monkeypatch):
    config = small("algo=grpo", "checkpoint.every=1")
    genuine = rollout_step.assign_credit

    def poisoned(*args, **kwargs):
        batch, metrics = genuine(*args, **kwargs)
        poisoned.calls += 1
        if poisoned.calls == 3:
            batch.advantages.fill_(float("nan"))
        return batch, metrics

    poisoned.calls = 0
    monkeypatch.setattr(rollout_step, "assign_credit", poisoned)
    with pytest.raises(
        TrainingDiverged,
        match=r"step 3: not finite: loss/total=nan, .*same command.*regime\.learning_rate=.*step_000001$",
    ):
        train.run(config)
    monkeypatch.undo()
    directory = train.run(config)  # the same command goes on from step 2
    assert [row["counter/rollout_step"] for row in logged(directory / "metrics.jsonl")] == [1, 2, 3]
