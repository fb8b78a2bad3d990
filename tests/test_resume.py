"""However a run was ended, and whatever became of its checkpoints, the same command ends in the same bits."""

import json
import os
import pty
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capo_exp.core import policy
from capo_exp.runs import logger
from capo_exp.runs.checkpoint import Checkpointer, find_damage, find_reference
from capo_exp.runs.files import list_checkpoints
from capo_exp.runs.identity import run_dir
from capo_exp.runs.processes import stop_signal
from capo_exp.training import loop as train
from capo_exp.training.learner import Learner
from tests.pieces import NO_TOKENIZER, logged, take_step
from tests.process_pieces import SERVER

STEPS = 48  # each ending lets one checkpoint more be written, on a busy machine many
SMALL = [
    "algo=capo", "algo.kl_coefficient=0.05", "logger=files", f"num_steps={STEPS}",
    "regime.prompts_per_step=3", "regime.group_size=4", "evaluation.num_problems=4",
    "dataset.max_completion_tokens=12", "checkpoint.every=2", "evaluation.every=3",
    "regime.learning_rate=5e-4", "logger.completions_every=1",
    "dataset.source.num_train=50", "dataset.source.num_eval=10",
]  # fmt: skip


def train_on(terminal, config):
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves it so
    screen = os.open(terminal, os.O_RDWR)  # becomes the controlling terminal of this session
    for descriptor in (1, 2):
        os.dup2(screen, descriptor)
    try:
        train.run(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        (Path(config.output_dir) / "error").write_text(traceback.format_exc())  # the terminal may be gone
        raise


def steps(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_until(config, ready, end):
    """Starts the run, ends it by a signal in that moment, and returns its exit status."""
    master, slave = pty.openpty()
    process = SERVER.Process(target=train_on, args=(os.ttyname(slave), config))
    process.start()
    deadline = time.monotonic() + 120
    while not ready(run_dir(config)):
        assert process.is_alive() and time.monotonic() < deadline, "the run ended before the signal"
        time.sleep(0.001)
    os.close(slave)
    if end == signal.SIGHUP:
        os.close(master)  # the kernel sends it, and the terminal is gone
    else:
        assert process.pid is not None
        os.kill(process.pid, end)
    process.join(60)
    if end != signal.SIGHUP:
        os.close(master)
    assert process.exitcode is not None
    assert not (error := Path(config.output_dir) / "error").exists(), error.read_text()
    return process.exitcode


def outcome(run):
    weights = load_file(run / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors")
    timeless = [json.dumps(row) for name in ("metrics", "eval") for row in logged(run / f"{name}.jsonl")]
    return {k: v.tolist() for k, v in weights.items()}, timeless, sorted(os.listdir(run / "completions"))


def record(run):
    return json.loads((run / "run.json").read_text())


@pytest.fixture
def config(composed, tmp_path):
    return composed(*SMALL, f"output_dir={tmp_path}")


@pytest.fixture(scope="module")
def undisturbed(composed, tmp_path_factory):
    return train.run(composed(*SMALL, f"output_dir={tmp_path_factory.mktemp('undisturbed')}"))


KILLS: list[Callable[[Path], bool]] = [
    lambda run: steps(run) >= 1,  # before the first checkpoint
    lambda run: any((run / "checkpoints").glob(".step_000002")),  # while a checkpoint is written
    lambda run: steps(run) >= 3,  # between two
]


@pytest.mark.slow
def test_killed_hung_up_and_interrupted_it_ends_in_the_same_bits(undisturbed, config):
    run = run_dir(config)
    for ready in KILLS:
        assert run_until(config, ready, signal.SIGKILL) == -signal.SIGKILL
        assert not (run / "checkpoints" / f"step_{STEPS:06d}").exists()
    for number, end in enumerate((signal.SIGHUP, signal.SIGINT), start=3):
        before = max(list_checkpoints(run))  # rows of a killed process may go beyond it
        assert run_until(config, lambda run, old=before: max(list_checkpoints(run)) > old, end) == 130
        assert (state := record(run))["status"] == "interrupted" and state["resumed"] == number
        assert steps(run) == max(list_checkpoints(run)) == state["counters"]["rollout_step"] < STEPS
    assert outcome(train.run(config)) == outcome(undisturbed)
    assert (record(run)["status"], record(run)["resumed"]) == ("finished", 5)


def spoil(checkpoint, how):
    """Damages a checkpoint; `how` is a file and what becomes of it."""
    name, _, change = how.partition(" ")
    path = checkpoint / name
    if how == "emptied":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    elif how == "of another seed":
        manifest = json.loads((checkpoint / "checkpoint.json").read_text())
        (checkpoint / "checkpoint.json").write_text(json.dumps(manifest | {"run_id": "0" * 8}))
    elif change == "missing":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif change in ("garbage", "deep"):
        path.write_bytes({"garbage": b"garbage", "deep": b"[" * 100_000}[change])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data)


DAMAGES = {
    "emptied": "checkpoint.json is missing",
    "of another seed": "it is step 2 of run 00000000",
    "trainer_state.pt cut": "trainer_state.pt is not what was written",
    "trainer_state.pt missing": "trainer_state.pt is missing",
    "model.safetensors bit": "model.safetensors is not what was written",
    "model.safetensors garbage": "model.safetensors is not what was written",
    "config.json missing": "config.json is missing",
    "tokenizer.json bit": "tokenizer.json is not what was written",
    "reference/model.safetensors bit": "reference/model.safetensors is not what was written",
    "checkpoint.json cut": "checkpoint.json cannot be read",
    "checkpoint.json garbage": "checkpoint.json cannot be read",
    "checkpoint.json deep": "checkpoint.json cannot be read",
}


@pytest.fixture
def tokenizer(composed):
    return policy.load_tokenizer(composed().model)


def test_the_newest_whole_checkpoint_is_used_and_a_damaged_one_is_named(
    small_model, tokenizer, tmp_path, caplog
):
    state = {"a": torch.arange(3.0), "b": {"c": 1}}
    whole = Checkpointer(tmp_path / "whole", keep=2, run_id="1a2b3c4d")
    for step in (1, 2):
        saved = whole.save(step, state, small_model, tokenizer, small_model)
    assert whole.latest() == saved and find_reference(saved) == saved / "reference"
    assert whole.restore(saved)["a"].tolist() == [0, 1, 2]
    for how, said in DAMAGES.items():
        shutil.copytree(tmp_path / "whole", tmp_path / how)
        spoil(tmp_path / how / "checkpoints" / "step_000002", how)
        caplog.clear()
        ours = Checkpointer(tmp_path / how, keep=2, run_id="1a2b3c4d")
        for _ in range(2):
            assert ours.latest() == tmp_path / how / "checkpoints" / "step_000001", how
        assert caplog.messages == [f"{tmp_path}/{how}/checkpoints/step_000002 is not used: {said}"]
    (tmp_path / how / "checkpoints" / "step_000001" / "checkpoint.json").unlink()
    assert Checkpointer(tmp_path / how, keep=2, run_id="1a2b3c4d").latest() is None
    assert "no whole checkpoint is left, so the run begins again" in caplog.text


def test_a_gpu_never_holds_a_state_twice(learner, random_batch, tokenizer, tmp_path):
    """It is read to the CPU, and what is taken over goes to the weights' device, for which meta stands."""
    ours = learner("algo=capo")
    take_step(ours, random_batch())
    keeper = Checkpointer(tmp_path, keep=1, run_id="1a2b3c4d")
    state = keeper.restore(keeper.save(1, ours.state_dict(), ours.model, tokenizer))
    table, moments = state["optimizer_model"], state["optimizer"]["state"][0]
    tensors = [*table.values(), *moments.values()]
    assert {value.device.type for value in tensors if isinstance(value, torch.Tensor)} == {"cpu"}
    with torch.device("meta"):
        model = type(ours.model)(ours.model.config)
    there = Learner(model, None, ours.algorithm, ours.config, torch.float32)
    there.load_state_dict(state)
    assert {there.optimizer_model.first.device.type, there.optimizer_model.slot_of_id.device.type} == {"meta"}
    devices = {name: value.device.type for name, value in next(iter(there.optimizer.state.values())).items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_steps_are_numbers_and_other_files_are_left_alone(small_model, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    for name in ("step_abc", "step_2", "step_-00003", "step_000007 (copy)", ".step_000004", "old"):
        (folder / name).mkdir(parents=True)
    for name in (".DS_Store", "step_000009", "._step_000003"):
        (folder / name).touch()
    ours = Checkpointer(tmp_path, keep=2, run_id="a")
    assert ours.latest() is None and not caplog.messages
    steps = (5, 999_998, 999_999, 1_000_000)
    for step in steps:
        ours.save(step, {}, small_model, NO_TOKENIZER)
    assert list(list_checkpoints(tmp_path)) == [999_999, 1_000_000]
    found = ours.latest(), ours.latest(before=1_000_000)
    assert found == (folder / "step_1000000", folder / "step_999999")
    spoil(folder / "step_1000000", "emptied")
    late = Checkpointer(tmp_path, keep=1, run_id="a")
    assert late.latest() == folder / "step_999999"
    (folder / "step_000006").symlink_to(folder / "old")
    for step in (9, 6):  # a file, and a link, with its name
        late.save(step, {}, small_model, NO_TOKENIZER)
    left = {path.name for path in folder.iterdir()}
    assert {".DS_Store", "._step_000003", "step_abc", "step_2", "old"} < left and ".step_000004" not in left
    assert find_damage(folder / "step_000006", "a") is None and not list((folder / "old").iterdir())


class Killed(BaseException):
    """Ends a run where a kill would: nothing is written any more."""


def kill_at(step, distance, run, patch):
    """Compares run.json with the newest checkpoint before each write of a run, of which one and all later
    ones fail: the first, second, ... from that on which lets the checkpoint of a step count."""
    written: list[str] = []

    def watch(owner, name):
        write = getattr(owner, name)

        def watched(place, *rest):
            if counters := record(run)["counters"] if (run / "run.json").exists() else {}:
                assert counters["rollout_step"] == max(list_checkpoints(run), default=0), written
            written.append(f"{name} {Path(getattr(place, 'name', place)).name}")
            if f"rename .step_{step:06d}" in written[: len(written) - distance + 1]:
                raise Killed
            return write(place, *rest)

        patch.setattr(owner, name, watched)

    for owner, name in ((Path, "replace"), (Path, "rename"), (logger, "append_line")):
        watch(owner, name)


@pytest.mark.slow
def test_run_json_agrees_with_the_newest_checkpoint_wherever_a_kill_comes(undisturbed, config):
    """Before a checkpoint counts, right after it does, and before the last word that the run has ended."""
    run = run_dir(config)
    for step, distance in ((2, 1), (4, 2), (6, 2), (STEPS, 3)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(step, distance, run, patch)
            train.run(config)
        assert record(run)["status"] == "running"
        assert max(list_checkpoints(run), default=0) == (step if distance > 1 else 0)
    train.run(config)
    assert outcome(run) == outcome(undisturbed)
    assert record(run)["counters"] == record(undisturbed)["counters"]


@pytest.mark.slow
def test_a_run_goes_on_from_an_older_checkpoint_and_run_json_agrees(undisturbed, config, caplog):
    run = run_dir(config)
    shutil.copytree(undisturbed, run)
    spoil(run / "checkpoints" / f"step_{STEPS:06d}", "model.safetensors bit")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "running"}))
    train.run(config)
    assert f"step_{STEPS:06d} is not used: model.safetensors is not what was written" in caplog.text
    assert outcome(run) == outcome(undisturbed)
    assert record(run)["counters"] == record(undisturbed)["counters"]


def test_a_run_that_slurm_starts_again_goes_on_although_it_was_to_begin_anew(
    composed, tmp_path, monkeypatch, capsys
):
    config = composed(*SMALL, "num_steps=2", "overwrite=true", f"output_dir={tmp_path}")
    monkeypatch.setattr(train, "stop_asked", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    assert "saved after step 1; the same command without overwrite=true goes on" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert [row["counter/rollout_step"] for row in logged(train.run(config) / "metrics.jsonl")] == [1, 2]
    assert "goes on after step 1" in capsys.readouterr().out


def test_nohup_is_respected_and_a_hang_up_is_a_signal_like_others():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for action, expected in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGHUP, action)
            with stop_signal(lambda text: None) as stopped:
                signal.raise_signal(signal.SIGHUP)
                assert stopped.is_set() == expected
                signal.raise_signal(signal.SIGTERM)
                assert stopped.is_set()
            assert signal.getsignal(signal.SIGHUP) == action
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_middle_of_a_line_is_a_signal_like_others():
    reader, writer = os.pipe()

    def press():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        while os.read(reader, 65_536):
            pass

    with (
        open(writer, "wb") as screen,
        stop_signal(lambda text: (screen.write(text.encode()), None)[1]) as stopped,
    ):
        thread = threading.Thread(target=press)
        thread.start()
        screen.write(b"a line longer than the pipe " * 10_000)
        assert stopped.is_set()
    thread.join()
    os.close(reader)
