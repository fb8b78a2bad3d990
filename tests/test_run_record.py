import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capo_exp.config.errors import ConfigError
from capo_exp.runs import lock
from capo_exp.runs import record as run_record
from capo_exp.runs.disk import find_removable
from capo_exp.runs.files import list_checkpoints, write_json
from capo_exp.runs.identity import run_dir, run_id
from capo_exp.runs.lock import is_locked, locked
from capo_exp.runs.record import RunRecord, clear, find_shorter, read_git_state, read_record, run_status
from capo_exp.sweep.job import compare_with_shorter


def recorded(run_dir):
    record = read_record(run_dir)
    assert record is not None
    return record


def test_a_finished_run_is_on_record(config, tmp_path):
    with locked(tmp_path), RunRecord(tmp_path, config, device_name="cpu") as record:
        assert run_status(tmp_path) == "running"
        record.update({"counter/completions": 96, "counter/rollout_step": 1})
        record.add({"data": "x"})
    written = recorded(tmp_path)
    assert written["status"] == run_status(tmp_path) == "finished"
    assert (written["run_id"], written["seeds"]) == (run_id(config), {"seed": 0})
    assert written["counters"] == {"completions": 96, "rollout_step": 1}
    assert written["cpu_count"] >= 1 and {"cpu", "memory"} <= written.keys() and written["packages"]["torch"]
    assert (written["resumed"], written["error"], written["data"]) == (0, None, "x")
    assert written["updated_at"].endswith("+00:00")


def test_nothing_on_record_names_the_machine_or_its_user(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "a-very-secret-value")
    with pytest.raises(ValueError), RunRecord(tmp_path, config):
        raise ValueError(f"no file {Path.home() / 'model'} or {Path.cwd() / 'data'}")
    text = (tmp_path / "run.json").read_text()
    for secret in ("a-very-secret-value", tmp_path, Path.home(), Path.cwd(), os.uname().release):
        assert str(secret) not in text
    assert not {"host", "hostname", "user", "username", "env"} & json.loads(text).keys()


def test_how_a_run_ended(config, tmp_path):
    ends = {ValueError("bad"): "failed", KeyboardInterrupt(): "interrupted", SystemExit(143): "interrupted"}
    for error, expected in ends.items():
        with pytest.raises(type(error)), RunRecord(tmp_path, config):
            raise error
        written = recorded(tmp_path)
        assert (written["status"], written["error"]) == (expected, f"{type(error).__name__}: {error}")


def test_a_resume_adds_up(config, tmp_path):
    with pytest.raises(KeyboardInterrupt), RunRecord(tmp_path, config) as record:
        record.update({"counter/completions": 96})
        assert recorded(tmp_path)["counters"] == {"completions": 96}
        record.forget()
        assert recorded(tmp_path)["counters"] == {}
        raise KeyboardInterrupt
    first = recorded(tmp_path)
    write_json(tmp_path / "run.json", {**first, "wall_seconds": 100.0})
    assert first["counters"] == {"completions": 96}
    with RunRecord(tmp_path, config, counters={"counter/completions": 48}):
        pass
    second = recorded(tmp_path)
    assert (second["resumed"], second["status"], second["error"]) == (1, "finished", None)
    assert second["wall_seconds"] >= 100.0
    assert second["started_at"] == first["started_at"]
    assert second["counters"] == {"completions": 48}


def test_commits_that_made_the_earlier_steps_stay_on_record(config, tmp_path, monkeypatch):
    for commit in "aabc":
        monkeypatch.setattr(run_record, "read_git_state", lambda _, commit=commit: {"commit": commit})
        RunRecord(tmp_path, config).update({"counter/rollout_step": ord(commit)})
    record = recorded(tmp_path)
    earlier = [(each["git"]["commit"], each["counters"]["rollout_step"]) for each in record["earlier"]]
    assert earlier == [("a", ord("a")), ("b", ord("b"))] and record["git"] == {"commit": "c"}
    assert all(each["packages"] and each["updated_at"] for each in record["earlier"])


def test_status_without_a_run_after_a_kill_and_of_a_broken_record(config, tmp_path):
    assert run_status(tmp_path / "nowhere") == "absent"
    RunRecord(tmp_path, config)  # never left, and nobody holds the lock
    assert run_status(tmp_path) == "interrupted"
    for text, said in (("{", "is not JSON"), ("[1]", r"got \[1\], expected a JSON object; remove it")):
        (tmp_path / "run.json").write_text(text)
        assert run_status(tmp_path) == "unreadable"
        with pytest.raises(ConfigError, match=said):
            RunRecord(tmp_path, config)
    for text in ('{"a": 1}', '{"wall_seconds": "x", "resumed": [], "started_at": 3}'):
        (tmp_path / "run.json").write_text(text)
        assert run_status(tmp_path) == "unreadable"
        RunRecord(tmp_path, config)
        written = recorded(tmp_path)
        assert written["resumed"] == 0 and written["wall_seconds"] < 60


@pytest.mark.parametrize("calls", range(1, 8))
def test_a_run_that_is_cleared_halfway_is_not_gone_on_from(config, tmp_path, monkeypatch, calls):
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    genuine, done = run_record.remove, []

    def remove(path):
        done.append(path)
        if len(done) > calls:
            raise OSError
        genuine(path)

    monkeypatch.setattr(run_record, "remove", remove)
    with locked(tmp_path):
        with RunRecord(tmp_path, config):
            pass
        with pytest.raises(OSError):
            clear(tmp_path)
    assert not list_checkpoints(tmp_path) and (calls == 1 or run_status(tmp_path) == "absent")


def test_a_resume_that_is_killed_at_once_still_knows_its_problems(config, tmp_path):
    RunRecord(tmp_path, config).add({"data": "abc", "compute_dtype": "bfloat16"})
    RunRecord(tmp_path, config)  # ended before it said what it had read
    assert (recorded(tmp_path)["data"], recorded(tmp_path)["compute_dtype"]) == ("abc", "bfloat16")


def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with (
        pytest.raises(ConfigError, match=r"cannot be locked \(No locks available\); expected output_dir"),
        locked(tmp_path),
    ):
        raise AssertionError


def test_clear_leaves_the_lock_and_what_is_not_ours(config, tmp_path):
    """Neither overwrite=true nor status --clean empties the folder that a link in a run names."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run / "completions", run / "disk" / "step_1", other / "step_000001"):
        folder.mkdir(parents=True)
    (other / "thesis.tex").write_text("mine")
    with locked(run):
        with RunRecord(run, config):
            pass
        for name, target in (("checkpoints", other), ("wandb", run / "disk")):
            (run / name).symlink_to(target)
        (run / "notes.txt").touch()
        assert find_removable(run, final_model=True) == []
        clear(run)
        left = [".lock", "checkpoints", "disk", "notes.txt", "wandb"]
        assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == left
    assert (run / "checkpoints").is_symlink() and [path.name for path in other.iterdir()] == ["thesis.tex"]


HOLDER = """
import os, sys, time
from pathlib import Path
from typing import Any
from capo_exp.runs.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork():
        sys.stdout.write("held\\n"); sys.stdout.flush()
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_kill_frees_the_run(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(ConfigError, match=rf"in progress in another process \(pid {holder.pid}\)"):
            locked(tmp_path).__enter__()
        holder.kill()  # its forked child lives on and must not keep the lock
        holder.wait()
        deadline = time.monotonic() + 5
        while is_locked(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        with locked(tmp_path):
            assert is_locked(tmp_path)
        assert not is_locked(tmp_path)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_git_state_and_diff(tmp_path, monkeypatch, config):
    checkout, run = tmp_path / "checkout", tmp_path / "run"
    module = checkout / "capo_exp" / "runs" / "record.py"
    for folder in (module.parent, checkout / "conf", run):
        folder.mkdir(parents=True)
    module.write_text("a = 1\n")

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(checkout), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(run_record, "__file__", str(module))
    assert read_git_state(run) is None
    git("init")
    assert read_git_state(run) is None  # not a checkout of this package
    git("add", ".")
    git("commit", "-m", "first")
    clean = read_git_state(run)
    assert clean is not None
    assert not clean["dirty"]
    assert len(clean["commit"]) == 40
    assert not (run / "git.diff").exists()
    module.write_text("a = 2\n")
    (checkout / "conf" / "new.yaml").write_text("fresh: 1\n")
    assert read_git_state(run) == {"commit": clean["commit"], "dirty": True}
    diff = (run / "git.diff").read_text()
    assert "+a = 2" in diff
    assert "+fresh: 1" in diff
    ask = run_record._git
    monkeypatch.setattr(
        run_record, "_git", lambda *given, **ok: None if given[1] == "diff" else ask(*given, **ok)
    )
    assert read_git_state(run) == {"commit": clean["commit"], "dirty": None}


def test_a_longer_run_is_told_of_the_shorter_that_is_finished(composed, tmp_path):
    def make(*overrides):
        return composed(f"output_dir={tmp_path}", *overrides)

    for overrides in (["num_steps=2"], ["num_steps=3"], ["num_steps=4", "seed=1"], ["num_steps=5"]):
        config = make(*overrides)
        (run_dir(config) / "checkpoints" / "step_000002").mkdir(parents=True)
        with RunRecord(run_dir(config), config):
            pass
    (run_dir(make("num_steps=3")) / "config.yaml").write_text("[")  # damaged
    (run_dir(make("num_steps=5")) / "run.json").write_text('{"status": "failed"}')
    shorter = run_dir(make("num_steps=2"))
    assert find_shorter(make("num_steps=9")) == {2: shorter} and not find_shorter(make("num_steps=2"))
    said = compare_with_shorter(make("num_steps=9"))
    assert said[0] == f"2 steps of this are finished: {shorter}"
    assert said[1] == "this run begins at step 0: the cosine schedule of its rate spans num_steps"
    assert said[2].endswith(f"model.path={shorter}/checkpoints/step_000002")
    assert compare_with_shorter(make("num_steps=9", "optimizer.schedule=constant")) == []  # another run
