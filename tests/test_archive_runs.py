"""scripts/archive_runs.py: a small copy of runs that figures read like the runs themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo_exp.runs.read import find_runs, load_completions, load_run

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"counter/rollout_step": 1, "counter/completions": 96, "reward/accuracy": 0.1 + 0.2, "loss/total": None},
    {"counter/rollout_step": 2, "counter/completions": 192, "reward/accuracy": 1e-17, "policy/entropy": 0.5},
]


def make_run(folder: Path, algorithm: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"algo: {{name: {algorithm}}}\nregime: {{name: aggressive}}\n")
    (folder / "run.json").write_text(json.dumps({"run_id": folder.name, "status": "finished"}))
    (folder / "eval.jsonl").write_text('{"counter/rollout_step": 0, "eval/accuracy": 0.5}\n')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "completions").mkdir()
    pq.write_table(pa.table({"reward": [1.0]}), folder / "completions" / "step_000002.parquet")
    (folder / "checkpoints").mkdir()


def archive(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "archive_runs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_archived_run_is_read_like_the_run_itself(tmp_path: Path) -> None:
    for name, algorithm in (("a", "capo"), ("b", "capo"), ("c", "grpo")):
        make_run(tmp_path / "outputs" / name, algorithm)
    for _ in range(2):  # a second time it takes the place of the first
        done = archive(f"runs={tmp_path}/outputs", f"output={tmp_path}/kept")
        assert done.returncode == 0 and done.stdout.startswith("3 runs, "), done.stderr
    kept = [load_run(path) for path in find_runs([tmp_path / "kept"])]
    assert [run.name for run in kept] == ["a", "b", "c"]
    for run in kept:
        before = load_run(tmp_path / "outputs" / run.name)
        assert (run.metrics, run.evaluations) == (before.metrics, before.evaluations)
        assert (run.config, run.record, run.state) == (before.config, before.record, "finished")
    assert [len(load_completions(run)) for run in kept] == [1, 0, 1]
    assert not (tmp_path / "kept" / "a" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "text"), [(["runs=nowhere", "output=x"], "nowhere: no such"), (["run=x"], "'run'")]
)
def test_wrong_arguments_are_one_line(arguments: list[str], text: str) -> None:
    done = archive(*arguments)
    assert done.returncode == 2
    assert text in done.stderr and done.stderr.count("\n") == 1
