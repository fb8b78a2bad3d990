"""The table of runs: from files alone, whatever state they are in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from capo_exp.cli.status import main
from capo_exp.config.schema import TrainConfig
from capo_exp.runs.identity import run_dir
from capo_exp.runs.lock import locked
from capo_exp.runs.record import RunRecord
from capo_exp.sweep.table import summarise_run


def row(step: int, **metrics: float | None) -> str:
    return json.dumps({"counter/rollout_step": step, "time/total_seconds": 2.0, **metrics}) + "\n"


@pytest.fixture
def config(tmp_path: Path, composed: Callable[..., TrainConfig]) -> TrainConfig:
    return composed(f"output_dir={tmp_path}", "num_steps=40")


def write(directory: Path, steps: int, cut: str = "") -> None:
    """Accuracy rises by 1 % a step; every tenth is null, as one that was not finite."""
    rows = [
        row(s, **{"reward/accuracy": None if s % 10 == 0 else s / 100, "selection/rejection_rate": 0.02})
        for s in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(rows) + cut)
    (directory / "eval.jsonl").write_text('{"eval/accuracy": 0.5}\n{"eval/accuracy": 0.6}\n')


def test_a_run_in_progress(config: TrainConfig) -> None:
    directory = run_dir(config)
    with locked(directory):
        RunRecord(directory, config)
        write(directory, 25, cut='{"counter/rollout_step": 26, "rew')
        line = summarise_run(directory)
    assert (line.state, line.step, line.num_steps) == ("running", 25, 40)
    assert line.seconds_left == 2.0 * 15
    steps = [16, 17, 18, 19, 21, 22, 23, 24, 25]  # the last ten, without the null
    assert line.train_accuracy == pytest.approx(sum(steps) / len(steps) / 100)
    assert line.eval_accuracy == 0.6 and line.rejection_rate == pytest.approx(0.02)


def test_a_run_whose_process_is_gone(config: TrainConfig) -> None:
    directory = run_dir(config)
    with locked(directory):
        RunRecord(directory, config)
        write(directory, 3)
    line = summarise_run(directory)
    assert (line.state, line.seconds_left) == ("interrupted", None)


def test_a_run_before_its_first_step_and_one_that_failed(
    config: TrainConfig, composed: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_dir(config)
    with locked(directory):
        RunRecord(directory, config)
        line = summarise_run(directory)
        assert (line.step, line.train_accuracy, line.seconds_left) == (0, None, None)
    other = composed(f"output_dir={config.output_dir}", "num_steps=40", "seed=1")
    with pytest.raises(ValueError, match="boom"), locked(run_dir(other)), RunRecord(run_dir(other), other):
        raise ValueError("boom\nand more")
    assert main([config.output_dir]) == 0
    shown = capsys.readouterr().out
    assert "ValueError: boom" in shown and "and more" not in shown
    assert "2 runs: 1 interrupted, 1 failed" in shown
    assert directory.name in shown  # in one piece, also where the output is no terminal


def test_a_broken_record_hides_no_other_run(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(run_dir(config)), RunRecord(run_dir(config), config):
        write(run_dir(config), 40)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "run.json is not JSON" in shown and "1 unreadable, 1 finished" in shown


def test_a_run_is_shown_once_however_often_it_is_named(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_dir(config)
    with locked(directory), RunRecord(directory, config):
        write(directory, 40)
    assert main([str(tmp_path), str(directory), f"{directory.parent}/*"]) == 0
    assert "1 runs: 1 finished" in capsys.readouterr().out


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no run there; expected a directory with runs" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or directory; expected" in capsys.readouterr().err
