import errno
import json
import math
import os

import pyarrow.parquet as pq
import pytest
import torch

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.read import read_jsonl


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def row(step, **more):
    return {
        "counter/rollout_step": step,
        "counter/completions": 96 * step,
        "reward/accuracy": 0.1 + 0.2 * step,
        **{key.replace("__", "/"): value for key, value in more.items()},
    }


def open_logger(run_dir, resume_step=0):
    return RunLogger(run_dir, resume_step=resume_step, wandb_mode="disabled")


def test_metrics_are_exact_sorted_and_there_at_once(run_dir):
    with open_logger(run_dir) as logger:
        logger.log_step(row(1, loss__total=0.1 + 0.2))
        text = (run_dir / "metrics.jsonl").read_text()
    assert text == (
        '{"counter/completions": 96, "counter/rollout_step": 1, '
        '"loss/total": 0.30000000000000004, "reward/accuracy": 0.30000000000000004}\n'
    )


def test_what_is_not_finite_is_null_and_what_is_not_known_is_refused(run_dir):
    with open_logger(run_dir) as logger:
        logger.log_step(row(1, policy__ratio_max=math.inf, loss__kl=math.nan))
        with pytest.raises(AssertionError, match="reward/typo"):
            logger.log_step(row(1, reward__typo=1.0))
        with pytest.raises(AssertionError, match=names.COMPLETIONS):
            logger.log_step({"reward/accuracy": 1.0})
    [line] = read_jsonl(run_dir / "metrics.jsonl")
    assert line["policy/ratio_max"] is None and line["loss/kl"] is None


def test_a_resume_drops_what_came_after_the_checkpoint(run_dir):
    with open_logger(run_dir) as logger:
        logger.log_evaluation(row(0, eval__accuracy=0.2))
        for step in (1, 2, 3):
            logger.log_step(row(step))
            logger.log_completions(step, [{"prompt": "a"}])
        logger.log_evaluation(row(3, eval__accuracy=0.3))
    before = (run_dir / "metrics.jsonl").read_text().splitlines()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"counter/rollout_step": 4, "counter/compl')  # killed while writing
    for name in (".step_000001.parquet.partial", "step_1 (copy).parquet"):
        (run_dir / "completions" / name).touch()
    with open_logger(run_dir, resume_step=2) as logger:
        logger.log_step(row(3))
    assert (run_dir / "metrics.jsonl").read_text().splitlines() == before
    assert [line["counter/rollout_step"] for line in read_jsonl(run_dir / "eval.jsonl")] == [0]
    samples = sorted(path.name for path in (run_dir / "completions").iterdir())
    assert samples == ["step_000001.parquet", "step_000002.parquet", "step_1 (copy).parquet"]
    open_logger(run_dir).finish(0)  # a fresh start
    assert (run_dir / "metrics.jsonl").read_text() == (run_dir / "eval.jsonl").read_text() == ""
    assert [path.name for path in (run_dir / "completions").iterdir()] == ["step_1 (copy).parquet"]


NO_ROWS = ("{half", "[1]", "{}", '{"counter/rollout_step": null}', "\0\0", '{"counter/rollout_step": "1x"}')


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_a_line_that_is_no_row_is_named_up_to_the_checkpoint(run_dir, name):
    first, second, third = (json.dumps(row(step)) for step in (1, 2, 3))
    for line in NO_ROWS:
        (run_dir / name).write_text(text := f"{first}\n{line}\n{second}\n")
        with pytest.raises(ConfigError, match=rf"{name}, line 2: expected .* \(.*\); mend .* overwrite=true"):
            open_logger(run_dir, resume_step=2)
        assert (run_dir / name).read_text() == text
        open_logger(run_dir, resume_step=0).finish(0)  # begins again, reads none of it
    (run_dir / name).write_bytes(f"{first}\n{second}\n{third}\n".encode() + b"{half\n\xff\xfe\n")
    open_logger(run_dir, resume_step=2).finish(0)
    assert (run_dir / name).read_text().splitlines() == [first, second]


def test_rows_that_are_missing_are_said_and_equal_ones_are_kept(run_dir, caplog):
    (run_dir / "metrics.jsonl").write_text((json.dumps(row(1)) + "\n") * 2)
    open_logger(run_dir, resume_step=1).finish(0)
    assert len(read_jsonl(run_dir / "metrics.jsonl")) == 2 and not caplog.records
    open_logger(run_dir, resume_step=3).finish(0)
    assert "rows of steps 2 to 3 are missing" in caplog.text


def test_floats_of_tokens_are_as_precise_as_bfloat16(run_dir):
    numbers = [0.0, 1 / 3, -1e-30, 3e-42, 65504.1, math.inf, -math.inf, math.nan, 1.0, -0.75]
    sample = dict.fromkeys(("policy_shift", "objective_shift", "log_prob"), numbers)
    with open_logger(run_dir) as logger:
        logger.log_completions(1, [sample, {key: [] for key in sample}])
        logger.log_completions(2, [{key: [] for key in sample}])
        logger.log_completions(3, [])
    [first, second] = pq.read_table(run_dir / "completions" / "step_000001.parquet").to_pylist()
    assert second == {key: [] for key in sample}
    for key in sample:
        assert first[key] == pytest.approx(numbers, rel=2**-8, abs=0, nan_ok=True)
        assert first[key][1] == torch.tensor(1 / 3).bfloat16().item() != pytest.approx(1 / 3, rel=1e-4)
    assert pq.read_table(run_dir / "completions" / "step_000003.parquet").num_rows == 0


def test_an_error_of_the_disk_at_a_checkpoint_names_the_file(run_dir, monkeypatch):
    synced: list[int] = []

    def fsync(file):
        synced.append(file.fileno())
        if len(synced) == 4:
            raise OSError(errno.EIO, "in the system's words")

    with open_logger(run_dir) as logger:
        monkeypatch.setattr(os, "fsync", fsync)
        logger.sync()
        assert len(set(synced)) == 2
        with pytest.raises(OSError, match=r"eval\.jsonl"):
            logger.sync()
        monkeypatch.undo()
