import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.runs import record as run_record
from capo_exp.runs.record import (
    RunRecord,
    as_dict,
    clear,
    locked,
    read,
    run_dir,
    run_id,
    status,
    write_atomic,
)


@pytest.fixture
def config(composed: Callable[..., TrainConfig], tmp_path: Path) -> TrainConfig:
    return composed("algo=grpo", "logger=files", f"output_dir={tmp_path}")


def test_the_same_command_has_the_same_id(composed: Callable[..., TrainConfig], config: TrainConfig) -> None:
    assert run_id(config) == run_id(composed("algo=grpo"))
    assert len(run_id(config)) == 8
    int(run_id(config), 16)


@pytest.mark.parametrize(
    "override",
    ["overwrite=true", "plan_only=true", "experiment_name=x", "logger.tags=[a]", "checkpoint.every=3"],
)
def test_what_does_not_change_results_does_not_change_the_id(
    composed: Callable[..., TrainConfig], config: TrainConfig, override: str
) -> None:
    assert run_id(composed("algo=grpo", override)) == run_id(config)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "num_steps=7", "regime.learning_rate=3e-5", "algo.token_loss.clip_eps_low=0.3", "algo=capo"],
)
def test_what_changes_results_changes_the_id(
    composed: Callable[..., TrainConfig], config: TrainConfig, override: str
) -> None:
    assert run_id(composed("algo=grpo", override)) != run_id(config)


def test_run_dir_is_readable_and_safe(config: TrainConfig, tmp_path: Path) -> None:
    assert run_dir(config) == tmp_path / "default" / (
        f"grpo-tiny-arithmetic-aggressive-lr0.0001-12x8-s0-{run_id(config)}"
    )
    model = dataclasses.replace(config.model, name="org/My Model=2")
    odd = dataclasses.replace(config, model=model, experiment_name="../paper/figure 1")
    assert run_dir(odd) == tmp_path / "paper_figure_1" / (
        f"grpo-org_My_Model_2-arithmetic-aggressive-lr0.0001-12x8-s0-{run_id(odd)}"
    )


def test_config_yaml_gives_the_config_back(config: TrainConfig, tmp_path: Path) -> None:
    RunRecord(tmp_path, config)
    loaded = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(tmp_path / "config.yaml"))
    assert OmegaConf.to_object(loaded) == config
    assert "${" not in (tmp_path / "config.yaml").read_text()


def test_a_finished_run_is_on_record(config: TrainConfig, tmp_path: Path) -> None:
    with locked(tmp_path), RunRecord(tmp_path, config, device_name="cpu") as record:
        assert status(tmp_path) == "running"
        record.update({"counter/completions": 96, "counter/rollout_step": 1})
    written = read(tmp_path)
    assert written is not None
    assert written["status"] == status(tmp_path) == "finished"
    assert written["run_id"] == run_id(config)
    assert written["counters"] == {"completions": 96, "rollout_step": 1}
    assert written["seeds"] == {"seed": 0}
    assert written["cpu_count"] >= 1 and {"cpu", "memory"} <= written.keys()
    assert written["resumed"] == 0
    assert written["error"] is None
    assert written["packages"]["torch"]
    assert written["updated_at"].endswith("+00:00")


def test_nothing_on_record_names_the_machine_or_its_user(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "a-very-secret-value")
    with pytest.raises(ValueError), RunRecord(tmp_path, config):
        raise ValueError(f"no file {Path.home() / 'model'} or {Path.cwd() / 'data'}")
    text = (tmp_path / "run.json").read_text()
    assert "a-very-secret-value" not in text
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert os.uname().release not in text
    assert not {"host", "hostname", "user", "username", "env"} & json.loads(text).keys()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError("bad"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(143), "interrupted")],
)
def test_how_a_run_ended(config: TrainConfig, tmp_path: Path, error: BaseException, expected: str) -> None:
    with pytest.raises(type(error)), RunRecord(tmp_path, config):
        raise error
    written = read(tmp_path)
    assert written is not None
    assert written["status"] == expected
    assert written["error"] == f"{type(error).__name__}: {error}"


def test_a_resume_adds_up(config: TrainConfig, tmp_path: Path) -> None:
    with RunRecord(tmp_path, config) as record:
        record.update({"counter/completions": 96})
        record.finish("interrupted")
    first = read(tmp_path)
    assert first is not None
    write_atomic(tmp_path / "run.json", json.dumps({**first, "wall_seconds": 100.0}))
    with RunRecord(tmp_path, config):
        pass
    second = read(tmp_path)
    assert second is not None
    assert (second["resumed"], second["status"], second["error"]) == (1, "finished", None)
    assert second["wall_seconds"] >= 100.0
    assert second["started_at"] == first["started_at"]
    assert second["counters"] == {"completions": 96}


def test_status_without_a_run_and_after_a_kill(config: TrainConfig, tmp_path: Path) -> None:
    assert status(tmp_path / "nowhere") == "absent"
    RunRecord(tmp_path, config)  # never left, and nobody holds the lock
    assert status(tmp_path) == "interrupted"


def test_a_broken_record_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read(tmp_path)


def test_clear_leaves_the_lock_and_what_is_not_ours(config: TrainConfig, tmp_path: Path) -> None:
    with locked(tmp_path):
        RunRecord(tmp_path, config)
        (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
        (tmp_path / "notes.txt").touch()
        clear(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), run_record.replacing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


HOLDER = """
import os, sys, time
from pathlib import Path
from capo_exp.runs.record import locked
with locked(Path(sys.argv[1])):
    if os.fork():
        sys.stdout.write("held\\n"); sys.stdout.flush()
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_kill_frees_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run_record.is_locked(tmp_path)
        with pytest.raises(ConfigError, match=rf"in progress in another process \(pid {holder.pid}\)"):
            locked(tmp_path).__enter__()
        holder.kill()  # its forked child lives on and must not keep the lock
        holder.wait()
        deadline = time.monotonic() + 5
        while run_record.is_locked(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        with locked(tmp_path):
            assert run_record.is_locked(tmp_path)
        assert not run_record.is_locked(tmp_path)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_git_state_and_diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    checkout, run = tmp_path / "checkout", tmp_path / "run"
    module = checkout / "capo_exp" / "runs" / "record.py"
    for folder in (module.parent, checkout / "conf", run):
        folder.mkdir(parents=True)
    module.write_text("a = 1\n")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(checkout), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(run_record, "__file__", str(module))
    assert run_record._git_state(run) is None
    git("init")
    assert run_record._git_state(run) is None  # not a checkout of this package
    git("add", ".")
    git("commit", "-m", "first")
    clean = run_record._git_state(run)
    assert clean is not None
    assert not clean["dirty"]
    assert len(clean["commit"]) == 40
    assert not (run / "git.diff").exists()
    module.write_text("a = 2\n")
    (checkout / "conf" / "new.yaml").write_text("fresh: 1\n")
    assert run_record._git_state(run) == {"commit": clean["commit"], "dirty": True}
    diff = (run / "git.diff").read_text()
    assert "+a = 2" in diff
    assert "+fresh: 1" in diff


def test_the_package_is_importable_without_torch() -> None:
    modules = "capo_exp.runs.record, capo_exp.runs.metrics, capo_exp.runs.console"
    code = f"import sys, {modules}; assert not {{'torch', 'wandb', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_as_dict_is_plain(config: TrainConfig) -> None:
    assert json.loads(json.dumps(as_dict(config))) == as_dict(config)
