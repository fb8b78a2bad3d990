"""W&B's own client, offline and against the server of wandb_server.py: the W&B run is what the files are."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.runs import wandb_start
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.read import read_jsonl
from capo_exp.runs.record import RunRecord, clear
from capo_exp.runs.wandb_file import history, is_whole, records
from capo_exp.runs.wandb_run import BEST, RECORD
from capo_exp.runs.wandb_start import has_key, resolve_mode
from capo_exp.training import loop as train
from tests.wandb_server import HISTORY, SUMMARY, Server, serve

KEY = "0123456789abcdef0123456789abcdef01234567"
CREDENTIALS = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()  # it has read the environment once and for all


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def offline(composed: Callable[..., TrainConfig]) -> TrainConfig:
    return composed("algo=grpo", "logger=wandb", "logger.wandb_mode=offline", "logger.tags=[a]")


@pytest.fixture
def online(composed: Callable[..., TrainConfig], server: Server) -> TrainConfig:
    return composed("algo=grpo", "logger=wandb", "logger.wandb_mode=online")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()
        yield server
        wandb.teardown()


def open_logger(run_dir: Path, config: TrainConfig, resume_step: int = 0) -> RunLogger:
    return RunLogger(run_dir, config, run_id="1a2b3c4d", resume_step=resume_step)


def log_step(logger: RunLogger, step: int, **more: float) -> None:
    named = {key.replace("__", "/"): value for key, value in more.items()}
    logger.log_step(
        {"counter/rollout_step": step, "counter/completions": 96 * step, "loss/total": 1 / 3} | named
    )


def log_evaluation(logger: RunLogger, step: int, accuracy: float) -> None:
    counters = {"counter/rollout_step": step, "counter/completions": 96 * step}
    logger.log_evaluation({**counters, "eval/accuracy": accuracy})


def half_a_run(run_dir: Path, config: TrainConfig) -> None:
    """Evaluation, three steps, evaluation; the checkpoint is of step 2. One value is not finite."""
    with open_logger(run_dir, config) as logger:
        log_evaluation(logger, 0, 0.5)
        for step in (1, 2):
            log_step(logger, step, loss__kl=math.inf if step == 1 else 2 / 7)
        third_step(logger)


def the_other_half(run_dir: Path, config: TrainConfig) -> str | None:
    with open_logger(run_dir, config, resume_step=2) as logger:
        third_step(logger)
        log_step(logger, 4, loss__kl=4 / 7)
        log_evaluation(logger, 4, 0.4)
        assert logger._wandb and logger._wandb._run.step == 7  # W&B holds no row back
        return logger.wandb_location


def third_step(logger: RunLogger) -> None:
    log_step(logger, 3, loss__kl=3 / 7)
    log_evaluation(logger, 3, 0.2)


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("*run-*/run-*.wandb"))


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of both files in the order of the run."""
    named = [("metrics.jsonl", 0), ("eval.jsonl", 1)]
    rows = [
        (row["counter/rollout_step"], place, row) for n, place in named for row in read_jsonl(run_dir / n)
    ]
    return comparable([row for *_, row in sorted(rows, key=lambda item: item[:2])])


def comparable(rows: list[Any]) -> list[dict[str, Any]]:
    """Without W&B's own keys and the clock (a step that was repeated took another time); NaN for null."""
    skip = ("_", "time/")
    kept = [{key: value for key, value in row.items() if not key.startswith(skip)} for row in rows]
    return [{k: "NaN" if v is None or math.isnan(v) else v for k, v in row.items()} for row in kept]


# --- offline ---


def test_the_offline_run_is_what_the_files_are_also_after_a_resume(
    run_dir: Path, offline: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    RunRecord(run_dir, offline)
    half_a_run(run_dir, offline)
    [before] = files(run_dir)
    location = the_other_half(run_dir, offline)
    [file] = files(run_dir)
    assert location == f"wandb sync {run_dir}/wandb/offline-run-*"
    assert file.name == before.name and file.name.startswith("run-1a2b3c4d-")
    rows = list(history(file))
    assert comparable(rows) == logged(run_dir)
    assert [row["_step"] for row in rows] == list(range(7))
    assert math.isnan(rows[1]["loss/kl"])  # null in metrics.jsonl; an export would not see a null

    [run] = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.job_type, list(run.tags)) == ("default", "train", ["a"])
    assert run.display_name.startswith("grpo-tiny-arithmetic-aggressive-lr0.0001-12x8-s0-")
    assert run.host == ""
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    config.pop("_wandb")
    assert config == OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    metrics = [record.metric for record in records(file) if record.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "counter/completions" for m in metrics)

    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_a_real_run_that_was_interrupted_has_every_key_in_wandb(
    composed: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(
        "algo=capo", "logger=wandb", "logger.wandb_mode=offline", "num_steps=3", "regime.prompts_per_step=3",
        "regime.group_size=4", "evaluation.num_problems=6", "dataset.max_completion_tokens=16",
        "checkpoint.every=2", "evaluation.every=2", "curvature.calibrate_every=2", f"output_dir={tmp_path}",
    )  # fmt: skip
    genuine, calls = train.take_step, []

    def interrupted(session: train.Session) -> None:
        genuine(session)
        calls.append(session.step)
        if calls == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    directory = train.run(config)
    assert calls == [1, 2, 3, 3]
    [file] = files(directory)
    rows = list(history(file))
    assert comparable(rows) == logged(directory)
    keys = {key for row in rows for key in row if not key.startswith("_")}
    kept = [*read_jsonl(directory / "metrics.jsonl"), *read_jsonl(directory / "eval.jsonl")]
    assert keys == {key for row in kept for key in row} and len(keys) > 70


def test_a_file_that_was_cut_anywhere_has_the_rows_before_the_cut(
    run_dir: Path, offline: TrainConfig, tmp_path: Path
) -> None:
    with open_logger(run_dir, offline) as logger:
        for step in range(1, 301):  # several blocks of 32 KiB, rows across their borders
            log_step(logger, step, loss__kl=1 / step)
    [file] = files(run_dir)
    data, rows = file.read_bytes(), list(history(file))
    assert [row["counter/rollout_step"] for row in rows] == list(range(1, 301)) and len(data) > 3 * 32768
    assert is_whole(file)
    counts = []
    for cut in [*range(0, len(data), 4999), *range(32750, 32790), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:cut])
        found = list(history(tmp_path / "cut"))
        assert found == rows[: len(found)] and not is_whole(tmp_path / "cut")
        counts.append(len(found))
    assert counts[-1] == 300 and len(set(counts)) > 15


def test_every_run_has_an_id_of_its_own(run_dir: Path, tmp_path: Path, offline: TrainConfig) -> None:
    """The same configuration of two people, two sweeps, or again with overwrite=true: W&B would mix them."""
    (tmp_path / "other").mkdir()
    names = []
    for folder in (run_dir, tmp_path / "other", run_dir):
        clear(folder)
        open_logger(folder, offline).finish(0)
        names.append(files(folder)[0].name)
    assert len(set(names)) == 3


def test_the_best_evaluation_is_in_the_summary(run_dir: Path, offline: TrainConfig) -> None:
    half_a_run(run_dir, offline)
    the_other_half(run_dir, offline)
    assert summary(files(run_dir)[0], BEST) == 0.5


def summary(file: Path, key: str) -> Any:
    """The last value of a key of W&B's summary."""
    updates = [update for record in records(file) for update in record.summary.update]
    return [json.loads(update.value_json) for update in updates if key in (update.key, *update.nested_key)][
        -1
    ]


def wandb_process() -> int:
    command = ["pgrep", "-P", str(os.getpid()), "wandb-core"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.parametrize("times", [1, 2])
def test_training_goes_on_when_the_process_of_wandb_dies(
    run_dir: Path, offline: TrainConfig, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    with open_logger(run_dir, offline) as logger:
        logger.describe({"run_id": "1a2b3c4d", "git": None})
        for step in range(1, 7):
            log_step(logger, step)
            if step <= times:
                os.kill(wandb_process(), signal.SIGKILL)
                time.sleep(0.2)
    assert [row["counter/rollout_step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == [*range(1, 7)]
    assert "its run is written again from the files" in caplog.text
    if times == 1:
        [file] = files(run_dir)
        assert comparable(list(history(file))) == logged(run_dir)
        assert summary(file, RECORD) == {"run_id": "1a2b3c4d", "git": None}
    else:
        assert "the run goes on without" in caplog.text


def test_an_offline_file_without_an_end_is_written_again(
    run_dir: Path, offline: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a disk that was full for a moment: W&B's process writes nothing more and says nothing."""
    monkeypatch.setattr("capo_exp.runs.wandb_run.END_SECONDS", 2.0)
    with open_logger(run_dir, offline) as logger:
        log_step(logger, 1)
        [first] = files(run_dir)
        whole = "capo_exp.runs.wandb_run.is_whole"
        monkeypatch.setattr(whole, lambda path: path.parent != first.parent and is_whole(path))
    [file] = files(run_dir)
    assert file.parent != first.parent and comparable(list(history(file))) == logged(run_dir)


# --- online ---


def test_online_a_resume_goes_on_in_the_same_run_and_repeats_nothing(
    run_dir: Path, online: TrainConfig, server: Server
) -> None:
    half_a_run(run_dir, online)
    [(wandb_id, run)] = server.runs.items()
    assert len(server.rows(wandb_id)) == 5 and run["state"] == "finished"
    assert (run["groupName"], run["jobType"]) == ("default", "train")
    the_other_half(run_dir, online)
    assert list(server.runs) == [wandb_id]
    assert comparable(server.rows(wandb_id)) == logged(run_dir)
    assert steps(server) == list(range(7))
    logs = "".join(path.read_text() for path in run_dir.rglob("debug-internal.log"))
    assert "stream: started" in logs and "ignoring" not in logs  # it would warn of each row that it has
    assert json.loads(run["files"][SUMMARY][-1])[BEST] == 0.5


def test_online_a_server_that_lost_rows_or_the_run_gets_them(
    run_dir: Path, online: TrainConfig, server: Server
) -> None:
    half_a_run(run_dir, online)
    [run] = server.runs.values()
    del run["files"]["wandb-history.jsonl"][2:], run["files"][SUMMARY]
    the_other_half(run_dir, online)
    assert comparable(server.rows(next(iter(server.runs)))) == logged(run_dir)
    server.runs.clear()
    with open_logger(run_dir, online, resume_step=4):
        pass
    assert comparable(server.rows(next(iter(server.runs)))) == logged(run_dir)


def test_an_upload_in_the_middle_of_an_offline_run_repeats_nothing(
    run_dir: Path, offline: TrainConfig, server: Server
) -> None:
    half_a_run(run_dir, offline)
    upload(f"wandb sync {files(run_dir)[0].parent}", run_dir)
    [wandb_id] = server.runs
    location = the_other_half(run_dir, offline)
    assert location == f"wandb sync {run_dir}/wandb/offline-run-*"
    upload(location, run_dir)
    assert list(server.runs) == [wandb_id]
    assert comparable(server.rows(wandb_id)) == logged(run_dir)
    assert steps(server) == list(range(7))


def steps(server: Server) -> list[int]:
    [run] = server.runs.values()
    return [json.loads(line)["_step"] for line in run["files"][HISTORY]]


def test_a_run_that_lost_its_server_is_uploaded_as_another_one(
    run_dir: Path, online: TrainConfig, offline: TrainConfig, server: Server
) -> None:
    half_a_run(run_dir, online)
    location = the_other_half(run_dir, offline)
    assert location
    upload(location, run_dir)
    first, second = server.runs
    assert len(server.rows(first)) == 5
    assert comparable(server.rows(second)) == logged(run_dir)


def upload(command: str, folder: Path) -> None:
    wandb.teardown()  # else the command looks for this process's service
    command = f"{Path(sys.executable).parent}/{command}"
    subprocess.run(command, shell=True, check=True, capture_output=True, cwd=folder)  # writes ./wandb/logs


def test_auto_goes_on_offline_when_the_server_is_away(
    run_dir: Path, composed: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, modes = wandb_start._init, []

    def init(run_dir: Path, config: TrainConfig, wandb_id: str, mode: str) -> Any:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route")
        return genuine(run_dir, config, wandb_id, mode)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_start, "_init", init)
    with open_logger(run_dir, composed("algo=grpo", "logger=wandb")) as logger:
        log_step(logger, 1)
    assert modes == ["online", "offline"] and comparable(list(history(files(run_dir)[0]))) == logged(run_dir)
    with pytest.raises(ConfigError, match="wandb_mode=offline"):
        open_logger(run_dir, composed("algo=grpo", "logger=wandb", "logger.wandb_mode=online"))


def test_auto_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text(f"machine other.example login user password {KEY}\n")
    assert not has_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert resolve_mode("auto") == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    with pytest.raises(ConfigError, match=r"logger\.wandb_mode"):
        resolve_mode("onlin")
