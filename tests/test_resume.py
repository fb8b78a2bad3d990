"""SIGKILL at three different points: the same command ends in the same bits as a run that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SMALL = [
    "algo=capo", "algo.kl_coefficient=0.05", "regime=aggressive", "logger=files", "num_steps=6",
    "regime.prompts_per_step=4", "regime.group_size=4", "evaluation.num_problems=8",
    "dataset.max_completion_tokens=24",
    "checkpoint.every=2", "evaluation.every=3", "regime.learning_rate=5e-4", "logger.completions_every=1",
]  # fmt: skip


def command(output: Path) -> list[str]:
    return [sys.executable, "-m", "capo_exp", *SMALL, f"output_dir={output}"]


def finish(output: Path) -> Path:
    done = subprocess.run(command(output), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (directory,) = (output / "default").glob("*")
    return directory


def kill_when(output: Path, ready: Callable[[Path], bool]) -> None:
    process = subprocess.Popen(
        command(output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not any(ready(directory) for directory in (output / "default").glob("*")):
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before the kill"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


KILLS: dict[str, Callable[[Path], bool]] = {
    "before the first checkpoint": lambda d: logged(d) >= 1,
    "while a checkpoint is written": lambda d: any((d / "checkpoints").glob(".step_000002")),
    "between two checkpoints": lambda d: logged(d) >= 5,
}


def outcome(directory: Path) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    weights = load_file(directory / "checkpoints" / "step_000006" / "model.safetensors")
    timeless = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        timeless += [json.dumps({k: v for k, v in row.items() if not k.startswith("time/")}) for row in rows]
    return weights, timeless, sorted(os.listdir(directory / "completions"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_goes_on_bit_for_bit(moment: str, undisturbed: Path, tmp_path: Path) -> None:
    kill_when(tmp_path, KILLS[moment])
    (directory,) = (tmp_path / "default").glob("*")
    assert not (directory / "checkpoints" / "step_000006").exists()
    assert finish(tmp_path) == directory
    weights, rows, completions = outcome(directory)
    expected_weights, expected_rows, expected_completions = outcome(undisturbed)
    assert rows == expected_rows and completions == expected_completions
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    record = json.loads((directory / "run.json").read_text())
    assert record["status"] == "finished" and record["resumed"] == 1


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(undisturbed: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not any(logged(d) >= 1 for d in (tmp_path / "default").glob("*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    (directory,) = (tmp_path / "default").glob("*")
    assert json.loads((directory / "run.json").read_text())["status"] == "interrupted"
    assert logged(directory) == int(
        max((directory / "checkpoints").glob("step_*")).name.removeprefix("step_")
    )
    assert outcome(finish(tmp_path))[1] == outcome(undisturbed)[1]
