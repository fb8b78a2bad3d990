"""What a run left on disk, in whatever state: found, and read as far as it goes."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from capo_exp.config.errors import ConfigError
from capo_exp.runs.console import summary_lines
from capo_exp.runs.lock import locked
from capo_exp.runs.read import (
    LoggedRun,
    find_runs,
    list_samples,
    load_completions,
    load_run,
    read_jsonl,
    read_series,
)
from capo_exp.runs.record import RunRecord
from capo_exp.runs.samples import Sample, read_sample

ROWS = [
    {"counter/rollout_step": 1, "reward/accuracy": 0.5},
    {"counter/rollout_step": 2, "reward/accuracy": None},
]


def make(path, mark="metrics.jsonl"):
    """A run directory with one of the files that make it one, and folders that are not runs."""
    path.mkdir(parents=True)
    (path / mark).write_text("{}\n")
    for inside in ("checkpoints/step_000010", "wandb/offline-run", "completions"):
        (path / inside).mkdir(parents=True)
        (path / inside / "run.json").write_text("{}")
    return path


@pytest.fixture
def tree(tmp_path):
    """Runs at three depths, hidden ones, a link to a run and one that leads back up."""
    outputs = tmp_path / "outputs"
    runs = {
        "a": make(outputs / "study" / "grpo-s0"),
        "b": make(outputs / "study" / "grpo-s1", mark="run.json"),
        "c": make(outputs / "deep" / "er" / "capo-s0"),
        "odd": make(outputs / "odd" / "lr[1e-4]*?"),
    }
    make(outputs / ".hidden" / "run")
    make(outputs / "study" / ".trash")
    (outputs / "study" / "multirun.yaml").write_text("hydra: {}\n")
    (outputs / "link").symlink_to(runs["a"])
    (outputs / "deep" / "up").symlink_to(outputs)
    return {"outputs": outputs, **runs}


def test_every_run_once_at_any_depth_and_none_inside_another(tree):
    found = find_runs([tree["outputs"]])
    assert {path.resolve() for path in found} == {tree[name] for name in ("a", "b", "c", "odd")}
    assert len(found) == 4 and found == sorted(found)


def test_of_two_links_to_a_run_the_first_name_counts(tmp_path, monkeypatch):
    """In whatever order the disk has them; the run is one that archive_runs.py wrote, without its record."""
    make(tmp_path / "run", mark="metrics.parquet")
    (tmp_path / "outputs").mkdir()
    for name in "ab":
        (tmp_path / "outputs" / name).symlink_to(tmp_path / "run")
    walk = os.walk

    def backwards(top, *, followlinks):
        for found in walk(top, followlinks=followlinks):
            found[1].sort(reverse=True)
            yield found

    monkeypatch.setattr(os, "walk", backwards)
    assert find_runs([tmp_path / "outputs"]) == [tmp_path / "outputs" / "a"]


PATTERNS = {
    "study/grpo-s0": "a", "study/grpo-s0/metrics.jsonl": "a", "study/grpo-s1/run.json": "b", "study": "a b",
    "study/*": "a b", "study/*s1": "b", "**/*-s0": "a c", "*/lr*": "odd",
    "d*": "a b c odd",  # by the link that leads up
    "odd/lr[1e-4]*?": "odd",  # a name, although it reads as a glob
}  # fmt: skip


def test_patterns(tree, monkeypatch):
    for pattern, expected in PATTERNS.items():
        found = find_runs([f"{tree['outputs']}/{pattern}"])
        assert sorted(path.resolve() for path in found) == sorted(tree[name] for name in expected.split())
    patterns = [tree["outputs"] / "study", str(tree["outputs"] / "*" / "*s0"), tree["outputs"] / "link"]
    assert find_runs(patterns) == [tree["a"], tree["b"]]  # each once
    monkeypatch.setenv("HOME", str(tree["outputs"]))
    assert find_runs(["~/study"]) == [tree["a"], tree["b"]]
    monkeypatch.chdir(tree["outputs"])
    assert find_runs(["study/*0"]) == [Path("study/grpo-s0")]


def test_a_link_that_leads_up_is_followed_once(tree, monkeypatch):
    visits: list[str] = []
    real = os.path.realpath
    monkeypatch.setattr("os.path.realpath", lambda path: visits.append(path) or real(path))
    find_runs([tree["outputs"]])
    assert len(visits) < 30


def test_what_is_shown_when_there_is_no_run(tree):
    study = tree["outputs"] / "study"
    for patterns, message in {
        (study, study / "nowhere"): r"nowhere: no such file or directory; expected .* run\.json or metrics",
        (f"{study}/nothing*",): r"nothing\*: no such",
        (study / "multirun.yaml",): r"multirun\.yaml: no run there; expected",
        ("",): "an empty name: no such",
        (): "no folder given",
    }.items():
        with pytest.raises(ConfigError, match=message):
            find_runs(patterns)
    (empty := tree["outputs"] / "empty").mkdir()
    assert find_runs([empty, tree["a"]]) == [tree["a"]]


def test_the_config_is_read_as_it_was_written(tmp_path, composed):
    config = composed(
        "algo.selection.policy_shift_max=inf", "regime.learning_rate=1e-5", "dataset.path='1e-5'"
    )
    with locked(tmp_path), RunRecord(tmp_path, config):
        pass
    run = load_run(tmp_path)
    assert run.config == asdict(config)
    assert run.config == OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert run.setting("regime.learning_rate") == 1e-5 and run.setting("dataset.path") == "1e-5"
    assert run.setting("no.such", "else") == "else" and run.setting("algo.name.more") is None
    assert (run.name, run.state) == (tmp_path.name, "finished")
    assert run.metrics == run.evaluations == []


def test_a_run_of_another_age_and_a_line_cut_short(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in ROWS)
    for text, rows in ((whole, 2), (whole[:60], 1), (whole[:9], 0), ("", 0)):
        (tmp_path / "metrics.jsonl").write_text(text)
        run = load_run(tmp_path)
        assert (run.config, run.record, run.evaluations, run.metrics) == ({}, {}, [], ROWS[:rows])
        assert (run.state, run.left_out, run.setting("algo.name")) == ("absent", (), None)


def test_what_is_damaged_is_named_and_hides_nothing_else(tmp_path):
    good = {"metrics.jsonl": '{"a": 1}\n\n', "eval.jsonl": '{"a": 2}\n', "config.yaml": "seed: 1\n"}
    good |= {"run.json": '{"status": "finished", "error": null}'}
    for name, damaged, said in (
        ("run.json", "{", "run.json is not JSON"),
        ("run.json", "[" * 100_000, "run.json is not JSON"),
        ("run.json", "\xff", "run.json is not JSON"),
        ("run.json", "[1]", r"got \[1\], expected a JSON object"),
        ("run.json", '{"status": "finished", "counters": null}', "run.json: counters is null"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        ("config.yaml", "just text", "expected the config of a run"),
        ("config.yaml", "seed: x\n", 'config.yaml: seed is "x"'),
        ("config.yaml", "algo: {num_iterations: two}\n", 'config.yaml: algo.num_iterations is "two"'),
        ("config.yaml", "algo: {selection: {policy_shift_max: a}}\n", 'policy_shift_max is "a"'),
        ("config.yaml", "algo: {selection: {objective_shift_min: a}}\n", 'objective_shift_min is "a"'),
        ("config.yaml", "algo: {selection: {objective_shift_max: a}}\n", 'objective_shift_max is "a"'),
        ("metrics.jsonl", '{"a": 1}\n\n{"a": 1\n{"a": 2}\n', r"metrics\.jsonl, line 3: not JSON"),
        ("metrics.jsonl", '{"a": 1}\n' + "[" * 100_000 + "\n", r"metrics\.jsonl, line 2: "),
        ("metrics.jsonl", '{"a": 1}\n\0\0\n', r"metrics\.jsonl, line 2: not JSON"),
        ("metrics.jsonl", '{"a": 1}\n{"counter/completions": null}\n', "line 2: counter/completions is null"),
        (
            "metrics.jsonl",
            f'{{"a": 1}}\n{{"counter/completions": {10**400}}}\n',
            "line 2: counter/completions is 1",
        ),
        ("metrics.jsonl", f'{{"a": 1}}\n{{"a": {10**400}}}\n', "line 2: a is 1"),
        ("eval.jsonl", '{"a": 2}\n{"a": "b"}\n', r'eval\.jsonl, line 2: a is "b", expected a number'),
        ("evaluations/test.jsonl", "[1]\n", r"test\.jsonl, line 1: got \[1\], expected a JSON object"),
        ("evaluations/test.jsonl", '{"cards": null}\n', "line 1: cards is null, expected a list of texts"),
        ("evaluations/test.jsonl", '{"cards": [{}]}\n', "line 1: cards is "),
        ("completions/step_000002.parquet", "PAR1 cut", "step_000002.parquet is not a parquet file"),
        ("metrics.parquet", "PAR1 cut", "metrics.parquet cannot be read as parquet"),
    ):
        for known, text in (good | {name: damaged}).items():
            (tmp_path / known).parent.mkdir(exist_ok=True)
            (tmp_path / known).write_text(text, encoding="latin-1")
        if name == "metrics.parquet":
            (tmp_path / "metrics.jsonl").unlink()
        run = load_run(tmp_path)
        assert len(run.left_out) == 1 and re.search(said, run.left_out[0]), run.left_out
        assert "\n" not in run.left_out[0]
        assert [row["a"] for row in run.evaluations] == [2]
        assert (run.setting("seed") == 1) == (name != "config.yaml")
        assert name == "run.json" or run.state == "finished"
        assert name == "metrics.parquet" or run.metrics[0] == {"a": 1}
        (tmp_path / name).unlink()
    pq.write_table(pa.table({"counter/completions": ["a"]}), tmp_path / "metrics.parquet")
    (told,) = load_run(tmp_path).left_out
    assert told.endswith('metrics.parquet: counter/completions is "a", expected a number')
    path = tmp_path / "strict.jsonl"  # who writes a file anew loses none of its lines
    path.write_bytes(b'{"a": 1}\n\n\xff\0\n')
    with pytest.raises(ConfigError, match=r"strict\.jsonl, line 3: not JSON .*; remove the line, or the run"):
        read_jsonl(path)


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "metrics.jsonl", "completions/step_000001.parquet"]
)
def test_a_pipe_in_place_of_a_file_is_damage_and_not_waited_for(tmp_path, name):
    for each in ("metrics.jsonl", "completions/step_000001.parquet"):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).touch()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert any(name in text for text in load_run(tmp_path).left_out)


def test_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        load_run(tmp_path)


def test_series_skips_what_is_missing_and_marks_what_was_not_finite():
    x_axis = "counter/completions"
    infinite = {x_axis: 5, "a": 1e300}
    rows = [{x_axis: 1, "a": 2}, {x_axis: 2}, {x_axis: 3, "a": None}, {"a": 4}, infinite]
    x, y = read_series(rows, "a")
    np.testing.assert_array_equal(x, [1, 3, 5])
    np.testing.assert_array_equal(y, [2, np.nan, np.nan])
    assert read_series([], "a")[0].shape == (0,)


def completions(path, step, count, **columns):
    folder = path / "completions"
    folder.mkdir(exist_ok=True)
    columns = {
        "reward": [float(i) for i in range(count)],
        "token_ids": [[i, i] for i in range(count)],
    } | columns
    table = pa.table(columns)
    pq.write_table(table, folder / f"step_{step:06d}.parquet")


def test_completions(tmp_path, caplog):
    run = LoggedRun(tmp_path, {}, {}, [], [])
    assert load_completions(run) == [] and load_completions(run, 10) == []
    completions(tmp_path, 1_000_000, 1)  # in the order of steps, not of names
    completions(tmp_path, 20, 2, tokens=[["a", "b"], []])
    (tmp_path / "completions" / ".step_000030.parquet.partial").write_text("half")
    found = load_completions(run)
    assert [row["step"] for row in found] == [20, 20, 1_000_000]
    assert found[1] == {"reward": 1.0, "token_ids": [1, 1], "tokens": [], "step": 20}
    assert load_completions(run, 20) == found[:2] and load_completions(run, 30) == []
    (tmp_path / "completions" / "step_abc.parquet").write_text("no step")
    (tmp_path / "completions" / "step_000040.parquet").write_bytes(b"PAR1 no PAR1")
    assert load_completions(run) == found and sorted(list_samples(tmp_path)) == [20, 40, 1_000_000]
    assert re.search(r"left out: .*step_000040\.parquet cannot be read", caplog.text)
    for foreign in ([[1], [2]], ["a", "b"], [1.0, 2.0]):
        completions(tmp_path, 20, 2, tokens=foreign)
        assert load_completions(run) == found[2:]
    assert "(tokens is double, expected a list of text); restore or remove it" in caplog.text
    completions(tmp_path, 20, 2, keep=[[True, False], [True]])
    assert [row["keep"] for row in load_completions(run, 20)] == [[True, False]]
    assert "step_000020.parquet: 1 completions, lists of unequal length" in caplog.text
    assert read_sample(tmp_path, 20, histograms=True) == Sample([[None, "", None, 0.0, None, None, 1]], {})
    text = [["a", None, "c", "d"]]
    completions(tmp_path, 20, 1, token_ids=[[]], tokens=text, keep=[[True, False, None, False]])
    sample = read_sample(tmp_path, 20, histograms=False)
    assert sample is not None and sample.rows[0][1] == "a[--]c[-d-]" and sample.rows[0][-1] == 2


def test_steps_of_a_finished_run_that_have_no_row_are_told(tmp_path):
    for status, steps, said in (
        ("finished", (1, 2, 3, 3, 4), []),
        ("finished", (1, 4), [f"{tmp_path}/metrics.jsonl: 2 of 4 steps have no row, of 2 to 3"]),
        ("finished", (1, 2, 3), [f"{tmp_path}/metrics.jsonl: 1 of 4 steps have no row, of 4"]),
        ("interrupted", (1, 2), []),
    ):
        record = {"status": status, "counters": {"rollout_step": 4}}
        (tmp_path / "run.json").write_text(json.dumps(record))
        rows = [json.dumps({"counter/rollout_step": step}) + "\n" for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(rows))
        assert list(load_run(tmp_path).left_out) == said
    shown = summary_lines(tmp_path)
    assert not any("left out" in line for line in shown)
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "finished"}))
    assert any(line.startswith("left out ") and "have no row" in line for line in summary_lines(tmp_path))
