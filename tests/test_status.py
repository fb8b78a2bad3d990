"""The table of runs: from files alone, whatever state they are in."""

import hashlib
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from capo_exp.cli.status import main
from capo_exp.runs.identity import run_dir
from capo_exp.runs.lock import locked
from capo_exp.runs.record import RunRecord
from capo_exp.sweep.table import runs_table, summarise_run

REFERENCE = Path(__file__).parents[1] / "outputs" / "reference"


@pytest.fixture
def config(tmp_path, composed):
    return composed(f"output_dir={tmp_path}", "num_steps=40")


def write(directory, steps, cut=""):
    """Accuracy rises by 1 % a step; every tenth is null, as one that was not finite."""
    shared = {"time/total_seconds": 2.0, "selection/rejection_rate": 0.02}
    rows = [
        {"counter/rollout_step": s, "reward/accuracy": None if s % 10 == 0 else s / 100, **shared}
        for s in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + cut)
    (directory / "eval.jsonl").write_text('{"eval/accuracy": 0.5}\n{"eval/accuracy": 0.6}\n')


def test_a_run_in_progress_and_one_whose_process_is_gone(config):
    directory = run_dir(config)
    with locked(directory):
        RunRecord(directory, config)
        line = summarise_run(directory)
        assert (line.step, line.train_accuracy, line.seconds_left) == (0, None, None)
        write(directory, 25, cut='{"counter/rollout_step": 26, "rew')
        line = summarise_run(directory)
    assert (line.state, line.step, line.num_steps, line.error) == ("running", 25, 40, None)
    assert line.seconds_left == 2.0 * 15
    steps = [16, 17, 18, 19, 21, 22, 23, 24, 25]  # the last ten, without the null
    assert line.train_accuracy == pytest.approx(sum(steps) / len(steps) / 100)
    assert line.eval_accuracy == 0.6 and line.rejection_rate == pytest.approx(0.02)
    line = summarise_run(directory)
    assert (line.state, line.seconds_left) == ("interrupted", None)


def test_a_failed_run_is_shown_once_with_its_error_whatever_that_says(config, tmp_path, capsys):
    directory = run_dir(config)
    with pytest.raises(ValueError), locked(directory), RunRecord(directory, config):
        raise ValueError("no [/data/x] in [bold]y[/bold]\nand more")
    write(directory, 3)
    assert main([str(tmp_path), str(directory), f"{directory.parent}/*"]) == 0
    shown = capsys.readouterr().out
    assert "ValueError: no [/data/x] in [bold]y[/bold]" in shown and "and more" not in shown
    assert directory.name in shown  # in one piece, also where the output is no terminal
    assert "1 runs: 1 failed" in shown
    Console(file=StringIO()).print(runs_table([summarise_run(directory)]))  # and in any console


def test_a_damaged_run_hides_no_other(config, tmp_path, capsys):
    """What of it can be read is shown; tests of runs.read have every kind of damage."""
    with locked(run_dir(config)), RunRecord(run_dir(config), config):
        write(run_dir(config), 40)
    (broken := tmp_path / "broken").mkdir()
    (broken / "run.json").write_text("{")
    (broken / "config.yaml").write_text("num_steps: many\n")
    rows = [f'{{"counter/rollout_step": {step}, "reward/accuracy": 0.9}}\n' for step in (39, 40)]
    (broken / "metrics.jsonl").write_text("[1]\n".join(rows))
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 finished" in shown and "1 unreadable" in shown
    line = summarise_run(broken)
    said = line.error or ""  # which the table folds where paths are long
    assert "left out: " in shown and "broken/run.json" in said and "broken/metrics.jsonl, line 2" in said
    assert (line.step, line.num_steps, line.train_accuracy) == (40, None, 0.9)


def test_shipped_runs_are_counted_though_their_rows_are_parquet(capsys):
    assert main([str(REFERENCE)]) == 0
    words = capsys.readouterr().out.split()
    assert (words.count("200/200"), words.count("16/16")) == (11, 7)
    assert not [word for word in words if word.startswith("0/") or word.endswith("/?")]


def test_no_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no run there; expected a directory with runs" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or directory; expected" in capsys.readouterr().err


@pytest.fixture
def three_runs(tmp_path):
    """One finished, one interrupted, one that cannot be read, each with checkpoints of three steps."""
    for status in ("finished", "interrupted", "nonsense"):
        directory = tmp_path / status
        for step in (10, 20, 30):
            folder = directory / "checkpoints" / f"step_{step:06d}"
            folder.mkdir(parents=True)
            (folder / "trainer_state.pt").write_bytes(b"x" * 1_000_000)
            digest = hashlib.sha256(b"x" * 1_000_000).hexdigest()
            manifest = {"run_id": "a", "step": step, "files": {"trainer_state.pt": digest}}
            (folder / "checkpoint.json").write_text(json.dumps(manifest))
        (directory / "completions").mkdir()
        (directory / "completions" / "step_000010.parquet").write_bytes(b"x" * 2_000_000)
        (directory / "checkpoints" / "step_notes").mkdir()
        (directory / "run.json").write_text(json.dumps({"status": status}))
    return tmp_path


def kept(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


ALL = ["step_000010", "step_000020", "step_000030", "step_notes"]


def test_what_runs_take_on_disk(three_runs, capsys):
    assert main([str(three_runs), "--disk"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = ["3.0", "MB", "2.0", "MB", "0.0", "MB", "5.0", "MB"]
    assert ["finished", "finished", *sizes] in lines[1:4]
    assert lines[-1] == ["3", "runs", "9.0", "MB", "6.0", "MB", "0.0", "MB", "15", "MB"]


def test_checkpoints_of_finished_runs_go_and_the_model_stays_until_it_is_named(
    three_runs, capsys, monkeypatch
):
    finished = three_runs / "finished"
    assert main([str(three_runs), "--clean"]) == 2 and kept(finished) == ALL
    assert "--clean: nobody can be asked here; expected --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert main([str(three_runs), "--clean"]) == 0 and kept(finished) == ALL
    shown = capsys.readouterr().out
    assert "step_000020" in shown and "step_000030" not in shown and "nothing is deleted" in shown
    assert "left alone, for it is interrupted" in shown and "for it is unreadable" in shown
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (finished / "checkpoints" / "step_000030" / "trainer_state.pt").write_bytes(b"damaged")
    assert main([str(three_runs), "--clean"]) == 0  # the newest whole one is the model
    assert kept(finished) == ALL[1:] and "deleted 1 checkpoints, 1.0 MB" in capsys.readouterr().out
    assert main([str(three_runs), "--clean", "--final-model", "--yes"]) == 0
    assert kept(finished) == ["step_notes"]
    assert kept(three_runs / "interrupted") == kept(three_runs / "nonsense") == ALL
    assert main([str(three_runs), "--yes"]) == 2


def test_a_run_in_progress_is_not_cleaned(three_runs, capsys):
    finished = three_runs / "finished"
    with locked(finished):  # begun again with overwrite=true
        assert main([str(finished), "--clean", "--yes"]) == 2
    assert "is in progress in another process" in capsys.readouterr().err and kept(finished) == ALL
