"""What a tracker has of a run is what the files are, by W&B's, TensorBoard's and Trackio's readers."""

import html
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from matplotlib.image import imsave
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from capo_exp.config.checks import check_trains
from capo_exp.config.errors import ConfigError
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.read import read_jsonl
from capo_exp.runs.record import RunRecord, clear
from capo_exp.runs.trackers import TITLES
from capo_exp.runs.wandb_sink import BEST, RECORD, _wandb_id, has_key, resolve_mode
from scripts.archive_runs import main as archive_runs
from scripts.write_wandb import main as write_wandb
from tests.test_disk_full import fill, mounted
from tests.wandb_server import HISTORY, SUMMARY, serve

KEY = "0123456789abcdef0123456789abcdef01234567"
CREDENTIALS = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")


@pytest.fixture(autouse=True)
def no_credentials(tmp_path, monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()  # it has read the environment once and for all


@pytest.fixture
def server(monkeypatch):
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()
        yield server
        wandb.teardown()


@pytest.fixture
def open_logger(composed):
    """Opens the logger of a run directory, which is made if it is not there."""
    config = composed("algo=grpo", "logger=wandb", "logger.tags=[a]", "logger.histograms_every=1")

    def make(run_dir, mode, resume_step=0, tracker="wandb"):
        run_dir.mkdir(parents=True, exist_ok=True)
        RunRecord(run_dir, config, device_name="cpu")
        return RunLogger(run_dir, resume_step=resume_step, wandb_mode=mode, tracker=tracker, draw=draw)

    return make


def draw(run_dir):
    """A picture of 2 x 2 pixels and a page."""
    picture, page = run_dir / "run.png", run_dir / "report.html"
    imsave(picture, np.eye(2))
    page.write_text("<p>the report</p>")
    return [picture, page]


def log_step(logger, step, **more):
    named = {key.replace("__", "/"): value for key, value in more.items()}
    logger.log_step(
        {"counter/rollout_step": step, "counter/completions": 96 * step, "loss/total": 1 / 3} | named
    )


def log_evaluation(logger, step, accuracy):
    counters = {"counter/rollout_step": step, "counter/completions": 96 * step}
    logger.log_evaluation({**counters, "eval/accuracy": accuracy})


def half_a_run(logger):
    """Evaluation, three steps, evaluation; the checkpoint is of step 2. One value is not finite."""
    log_evaluation(logger, 0, 0.5)
    for step in (1, 2):
        log_step(logger, step, loss__kl=math.inf if step == 1 else 2 / 7)
    third_step(logger)
    logger.finish(1)


def the_other_half(logger):
    with logger:
        third_step(logger)
        log_step(logger, 4, loss__kl=4 / 7)
        log_evaluation(logger, 4, 0.4)
        assert logger.tracker_location
        return logger.tracker_location


SAMPLE = {
    "prompt": "1+1=", "completion": "It is | 2", "answer": "2", "reward": 1.0, "advantage": 0.5,
    "truncated": False, "tokens": ["It", " is", " |", " 2"], "keep": [True, False, False, True],
    "policy_shift": [1e-8, 0.0, 1e-2, 1.0], "objective_shift": [-1e-4, 1e-3, math.nan, 0.0],
}  # fmt: skip
MARKED = "It[- is |-] 2"


def third_step(logger):
    logger.log_completions(3, [SAMPLE, {**SAMPLE, "advantage": -0.5}])
    log_step(logger, 3, loss__kl=3 / 7)
    log_evaluation(logger, 3, 0.2)


def assert_same(run, run_dir):
    """W&B's run has each row of the files once, in the order of the run, with its number."""
    rows = [*read_jsonl(run_dir / "metrics.jsonl"), *read_jsonl(run_dir / "eval.jsonl")]
    rows.sort(key=lambda row: row["counter/rollout_step"])
    there = [json.loads(line) for line in run["files"][HISTORY]]
    there = [row for row in there if "run/run" not in row]  # the media, after the last
    assert ["completions" in row for row in there] == [
        "loss/kl" in row and row["loss/kl"] == 3 / 7 for row in there
    ]
    media = ("completions", *HISTOGRAMS)
    there = [{key: value for key, value in row.items() if key not in media} for row in there]
    assert [row.pop("_step") for row in there] == list(range(len(rows)))
    found = [{key: value for key, value in row.items() if key[0] != "_"} for row in there]
    found, expected = (json.dumps(each, sort_keys=True) for each in (found, rows))
    assert found.replace('"NaN"', "NaN") == expected.replace("null", "NaN")  # an export would not see a null


HISTOGRAMS = [
    f"histogram/{key}"
    for key in ("policy_shift_log10", "objective_gain_log10", "objective_loss_log10", "advantage")
]


def upload(command, folder):
    wandb.teardown()  # else the command looks for this process's service
    command = f"{Path(sys.executable).parent}/{command}"
    subprocess.run(command, shell=True, check=True, capture_output=True, cwd=folder)  # writes ./wandb/logs


@pytest.mark.slow  # `wandb sync`
def test_what_is_uploaded_of_an_offline_run_is_what_the_files_are_also_after_a_resume(
    tmp_path, open_logger, server
):
    run_dir = tmp_path / "run"
    half_a_run(open_logger(run_dir, "offline"))
    location = the_other_half(open_logger(run_dir, "offline", 2))
    assert location == f"wandb sync {run_dir}/wandb/offline-run-*"
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 3 and not [path for path in written if KEY.encode() in path.read_bytes()]
    upload(location, tmp_path)
    [(wandb_id, run)] = server.runs.items()
    assert wandb_id.startswith(f"{(record := json.loads((run_dir / 'run.json').read_text()))['run_id']}-")
    assert_same(run, run_dir)
    assert (run["groupName"], run["jobType"]) == ("default", "train")
    assert run["tags"] == ["a", "grpo", "tiny", "arithmetic", "aggressive", "seed 0"]
    assert run["displayName"] == record["name"] and not run.get("host")
    config = {key: item["value"] for key, item in json.loads(run["config"]).items()}
    assert "counter/completions" in json.dumps(config.pop("_wandb"))  # the x axis
    assert config == OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    summary = json.loads(run["files"][SUMMARY][-1])
    assert summary[BEST] == 0.5 and summary[RECORD] == record
    [table] = [body for name, body in server.uploads.items() if "completions" in name]
    shown = [dict(zip(json.loads(table)["columns"], row, strict=True)) for row in json.loads(table)["data"]]
    shown = [(row["completion"], row["rejected"], row["advantage"]) for row in shown]
    assert shown == [(MARKED, 2, 0.5), (MARKED, 2, -0.5)]
    assert (run_dir / "run.png").read_bytes() in server.uploads.values()
    assert b"<p>the report</p>" in server.uploads.values()
    [row] = [row for row in map(json.loads, run["files"][HISTORY]) if "completions" in row]
    assert {key: sum(row[key]["values"]) for key in HISTOGRAMS} == dict(
        zip(HISTOGRAMS, (6, 2, 2, 2), strict=True)
    )
    assert row[HISTOGRAMS[0]]["bins"][0] == pytest.approx(-8, rel=1e-3)


@pytest.mark.slow
def test_a_file_that_a_full_disk_may_have_cut_short_is_told_of_and_a_command_writes_it_anew(
    tmp_path, open_logger, caplog, capsys
):
    """And one of a run that was killed, which has written none."""
    with mounted(tmp_path / "disk", "2m") as disk:
        with open_logger(disk / "run", "offline") as logger:
            for step in range(1, 60):
                log_step(logger, step, loss__kl=math.pi * step)
            fill(disk)
            os.truncate(disk / "filler", os.path.getsize(disk / "filler") - 30_000)
            logger.finish(1)  # with no picture, which would be what does not fit
        assert re.search(
            r"not complete \(0\.0 MB are free, .*cut short\).*write_wandb\.py .*/run`", caplog.text
        )
        (disk / "filler").unlink()
        caplog.clear()
        for _ in range(2):
            assert write_wandb([str(disk)]) == 0
            assert capsys.readouterr().out == f"wandb sync {disk}/run/wandb/offline-run-*\n"
            [whole] = disk.glob("run/wandb/offline-run-*/*.wandb")
            assert whole.stat().st_size > 30_000 and "not complete" not in caplog.text
            shutil.rmtree(disk / "run" / "wandb")


@pytest.mark.slow
def test_a_run_that_goes_on_after_its_upload_or_its_server_is_another_and_whole(
    tmp_path, open_logger, server
):
    half_a_run(open_logger(tmp_path / "offline", "offline"))
    upload(f"wandb sync {tmp_path}/offline/wandb/offline-run-*", tmp_path)
    half_a_run(open_logger(tmp_path / "online", "online"))
    assert [len(server.rows(name)) for name in server.runs] == [5, 5]
    for name in ("offline", "online"):
        upload(the_other_half(open_logger(tmp_path / name, "offline", 2)), tmp_path)
        *_, last = server.runs.values()
        assert_same(last, tmp_path / name)
    assert len(server.runs) == 4


@pytest.mark.slow
def test_online_a_resume_goes_on_in_the_same_run_and_repeats_nothing(tmp_path, open_logger, server):
    run_dir = tmp_path / "run"
    half_a_run(open_logger(run_dir, "online"))
    [(wandb_id, run)] = server.runs.items()
    assert len(server.rows(wandb_id)) == 5 and run["state"] == "failed"
    assert the_other_half(open_logger(run_dir, "online", 2)).endswith(f"/runs/{wandb_id}")
    assert list(server.runs) == [wandb_id]
    assert_same(run, run_dir)
    logs = "".join(path.read_text() for path in run_dir.rglob("debug-internal.log"))
    assert "stream: started" in logs and "ignoring" not in logs  # it would warn of each row that it has
    assert json.loads(run["files"][SUMMARY][-1])[BEST] == 0.5


@pytest.mark.slow
def test_online_a_server_that_lost_rows_or_the_run_gets_them_and_every_run_has_an_id_of_its_own(
    tmp_path, open_logger, server
):
    """The same configuration of two people, two sweeps, or again with overwrite=true: W&B would mix them."""
    half_a_run(open_logger(tmp_path / "run", "online"))
    [run] = server.runs.values()
    del run["files"][HISTORY][2:], run["files"][SUMMARY]
    the_other_half(open_logger(tmp_path / "run", "online", 2))
    assert_same(run, tmp_path / "run")
    server.runs.clear()
    open_logger(tmp_path / "run", "online", 4).finish(0)
    [run] = server.runs.values()
    assert_same(run, tmp_path / "run")
    clear(tmp_path / "run")
    for number, name in enumerate(("run", "other"), start=2):
        open_logger(tmp_path / name, "online").finish(0)
        assert len(server.runs) == number


def test_of_an_archived_run_all_rows_are_written(tmp_path, open_logger, monkeypatch):
    half_a_run(open_logger(tmp_path / "outputs" / "run", "disabled", tracker="files"))
    assert archive_runs([f"runs={tmp_path}/outputs", f"output={tmp_path}/kept"]) == 0
    rows = []
    sink = SimpleNamespace(
        there=0, log=lambda _, x, row, sample: rows.append((x, sample)), finish=lambda *_: 0
    )
    monkeypatch.setattr("capo_exp.runs.trackers.open_sink", lambda *_: sink)
    assert write_wandb([f"{tmp_path}/kept"]) == 0
    assert [(x, sample is not None) for x, sample in rows] == [
        (0, False), (96, False), (192, False), (288, True), (288, False)
    ]  # fmt: skip


def test_an_online_id_that_a_full_disk_left_empty_is_made_anew(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "online_id").touch()
    made = _wandb_id(tmp_path, "1a2b", "online")
    assert made.startswith("1a2b-") and _wandb_id(tmp_path, "1a2b", "online") == made


@pytest.mark.slow
def test_training_goes_on_when_the_process_of_wandb_dies_and_nothing_is_lost(
    tmp_path, open_logger, server, caplog
):
    with open_logger(tmp_path / "run", "online") as logger:
        for step in range(1, 7):
            log_step(logger, step)
            if step == 1:
                find = ["pgrep", "-P", str(os.getpid()), "wandb-core"]
                found = subprocess.run(find, capture_output=True, text=True, check=True).stdout
                os.kill(int(found.split()[-1]), signal.SIGKILL)
                time.sleep(0.2)
        location = logger.tracker_location
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 6
    assert "the run goes on offline" in caplog.text and location
    upload(location, tmp_path)
    *_, last = server.runs.values()
    assert_same(last, tmp_path / "run")


@pytest.mark.slow
def test_auto_goes_on_offline_when_the_server_is_away_and_without_a_key_in_silence(
    tmp_path, open_logger, monkeypatch, caplog,
    capfd,
):  # fmt: skip
    genuine, modes = wandb.init, []

    def init(**given):
        modes.append(given["mode"])
        if given["mode"] == "online":
            raise wandb.errors.CommError("no route")
        return genuine(**given)

    monkeypatch.setattr(wandb, "init", init)
    caplog.set_level(logging.WARNING)
    half_a_run(open_logger(tmp_path / "silent", "auto"))
    assert list(tmp_path.glob("silent/wandb/offline-run-*/run-*.wandb"))
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(ConfigError, match="wandb_mode=offline"):
        open_logger(tmp_path / "run", "online")
    half_a_run(open_logger(tmp_path / "run", "auto"))
    assert modes == ["offline", "online", "online", "offline"]


def test_a_failure_at_the_end_is_said_and_no_more(tmp_path, open_logger, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    half_a_run(open_logger(tmp_path / "run", "offline"))
    assert "W&B's run is not complete (division by zero); the files have all of it" in caplog.text


def test_auto_is_online_only_with_a_key(tmp_path, monkeypatch):
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


def test_tensorboard_has_the_files_also_after_a_resume(tmp_path, open_logger):
    run_dir = tmp_path / "run"
    half_a_run(open_logger(run_dir, "disabled", tracker="tensorboard"))
    logger = open_logger(run_dir, "disabled", 2, tracker="tensorboard")
    assert the_other_half(logger) == f"tensorboard --logdir {tmp_path}"
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss/kl")]
    assert [step for step, _ in scalars] == [96, 192, 288, 384] and math.isnan(scalars[0][1])
    assert [event.value for event in events.Scalars("eval/accuracy")] == pytest.approx([0.5, 0.2, 0.4])
    assert [(event.step, event.histogram_value.num) for event in events.Histograms(HISTOGRAMS[0])] == [
        (288, 6)
    ]
    [text] = events.Tensors("completions/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert MARKED in html.unescape(table) and MARKED not in table and "\n|---|" in table
    assert events.Images("run/run")[0].width == 2


def test_trackio_has_the_files_also_after_a_resume_and_says_nothing(
    tmp_path, open_logger, monkeypatch, capfd
):
    run_dir = tmp_path / "run"
    for name, value in (("TRACKIO_DIR", str(tmp_path / "trackio")), ("TRACKIO_SPACE_ID", "someone/space")):
        monkeypatch.setenv(name, value)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    half_a_run(open_logger(run_dir, "disabled", tracker="trackio"))
    assert (
        the_other_half(open_logger(run_dir, "disabled", 2, tracker="trackio"))
        == "trackio show --project capo_exp"
    )
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("capo_exp", "run")
    kl = [(row["step"], row["loss/kl"]) for row in rows if "loss/kl" in row]
    assert [step for step, _ in kl] == [96, 192, 288, 384]
    [sampled] = [row for row in rows if "completions" in row]
    assert [row["completion"] for row in sampled["completions"]["_value"]] == [MARKED] * 2
    assert sum(sampled[HISTOGRAMS[0]]["values"]) == 6
    assert "file_path" in rows[-1]["run/run"]
    half_a_run(open_logger(tmp_path / "other" / "run", "disabled", tracker="trackio"))
    ids = [(folder / "run" / "trackio_id").read_text() for folder in (tmp_path, tmp_path / "other")]
    first, second = (SQLiteStorage.get_logs("capo_exp", "run", run_id=each) for each in ids)
    assert len(first) == len(rows) and len(second) > 0  # of one name, each keeps its own
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_fails_is_one_warning_and_its_run_is_written_at_the_end(
    tracker, tmp_path, open_logger, monkeypatch, caplog
):
    sinks: list[Any] = []

    class Sink:
        """Fails at the second row of the first that is opened."""

        there, location = 0, "somewhere"

        def __init__(self, *_):
            self.rows: list[int] = []
            sinks.append(self)

        def log(self, number, *_):
            if len(sinks) == 1 and number == 1:
                raise RuntimeError("it is gone")
            self.rows.append(number)

        def finish(self, *_):
            pass

    monkeypatch.setattr("capo_exp.runs.trackers.open_sink", Sink)
    half_a_run(open_logger(tmp_path / "run", "disabled", tracker=tracker))
    assert [sink.rows for sink in sinks] == [[0], [0, 1, 2, 3, 4]]
    ours = [record for record in caplog.records if record.name.startswith("capo_exp")]  # not W&B's threads
    assert [record.getMessage() for record in ours] == [
        f"no {TITLES[tracker]} (it is gone): it is written from the files when the run ends"
    ]


def test_a_tracker_that_is_not_installed_is_one_line(composed, monkeypatch):
    monkeypatch.setattr("capo_exp.config.checks.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r'^logger=trackio: .* pip install "capo_exp\[trackio\]"; or logger=files$'
    ):
        check_trains(composed("logger=trackio"))
    check_trains(composed("logger=files"))
