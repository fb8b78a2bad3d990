"""scripts/archive_runs.py: a small copy of runs that figures read like the runs themselves."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo_exp.runs.read import find_runs, load_completions, load_run
from scripts.archive_runs import main

ROWS = [
    {"counter/rollout_step": 1, "counter/completions": 96, "reward/accuracy": 0.1 + 0.2, "loss/total": None},
    {"counter/rollout_step": 2, "counter/completions": 192, "reward/accuracy": 1e-17, "policy/entropy": 0.5},
]


def make_run(folder, algorithm):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"algo: {{name: {algorithm}}}\nregime: {{name: aggressive}}\n")
    (folder / "run.json").write_text(json.dumps({"run_id": folder.name, "status": "finished"}))
    (folder / "eval.jsonl").write_text('{"counter/rollout_step": 0, "eval/accuracy": 0.5}\n')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "completions").mkdir()
    pq.write_table(pa.table({"reward": [1.0]}), folder / "completions" / "step_000002.parquet")
    (folder / "checkpoints").mkdir()


def test_an_archived_run_is_read_like_the_run_itself(tmp_path, capsys):
    for name, algorithm in (("a", "capo"), ("b", "capo"), ("c", "grpo")):
        make_run(tmp_path / "outputs" / name, algorithm)
    for _ in range(2):  # a second time it takes the place of the first
        assert main([f"runs={tmp_path}/outputs", f"output={tmp_path}/kept"]) == 0
        assert capsys.readouterr().out.startswith("3 runs, ")
    kept = [load_run(path) for path in find_runs([tmp_path / "kept"])]
    assert [run.name for run in kept] == ["a", "b", "c"]
    for run in kept:
        before = load_run(tmp_path / "outputs" / run.name)
        assert (run.metrics, run.evaluations) == (before.metrics, before.evaluations)
        assert (run.config, run.record, run.state) == (before.config, before.record, "finished")
    assert [len(load_completions(run)) for run in kept] == [1, 0, 1]
    assert not (tmp_path / "kept" / "a" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("runs", "output", "said"),
    [
        ("one", "one", "would be deleted"),  # a run in its own place
        ("one/a/a", "one", "would be deleted"),  # and one inside what would be replaced
        ("one/a", "link", "would be deleted"),
        ("one,two", "kept", "would both be"),
    ],
)
def test_no_copy_takes_the_place_of_a_run_or_of_another_copy(
    runs, output, said, tmp_path, monkeypatch,
    capsys,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for folder in ("one/a", "two/a", "one/a/a"):
        make_run(Path(folder), "capo")
    Path("link").symlink_to("one")
    before = sorted(tmp_path.rglob("*"))
    assert main([f"runs={runs}", f"output={output}"]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.chdir("two/a")
    assert main(["runs=.", "output=../../kept"]) == 0  # by the name that the folder has
    assert (tmp_path / "kept" / "a" / "metrics.parquet").exists()


def test_what_a_strangers_run_links_to_is_not_copied(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("algo: {name: hidden}\n")
    run = tmp_path / "outputs" / "a"
    make_run(run, "capo")
    (run / "completions" / "notes").symlink_to(secret)
    arguments = [f"runs={tmp_path}/outputs", f"output={tmp_path}/kept"]
    assert main(arguments) == 0
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(secret)
    assert main(arguments) == 2
    assert "config.yaml is a link, which is not followed" in capsys.readouterr().err
    assert not [
        path for path in tmp_path.glob("kept/**/*") if path.is_file() and b"hidden" in path.read_bytes()
    ]


def test_wrong_arguments_are_one_line(capsys):
    for arguments, text in ((["runs=nowhere", "output=x"], "nowhere: no such"), (["run=x"], "'run'")):
        assert main(arguments) == 2
        line = capsys.readouterr().err
        assert text in line and line.count("\n") == 1
