"""A disk that takes no more stops a run in one line, loses nothing, and the same command goes on."""

import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from capo_exp.config.errors import RunFailed
from capo_exp.distributed.sharding import save_shards
from capo_exp.runs.checkpoint import Checkpointer
from capo_exp.runs.files import (
    append_line,
    find_disk_error,
    name_disk_error,
    replace_file,
    stop_on_disk_error,
)
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.record import RunRecord, run_status
from capo_exp.training import loop as train
from tests.pieces import logged, run_training

SMALL = [
    "algo=grpo", "num_steps=4", "regime.prompts_per_step=2", "regime.group_size=2",
    "evaluation.num_problems=2", "dataset.max_completion_tokens=8", "checkpoint.every=2",
    "checkpoint.keep=1", "logger.completions_every=1", "evaluation.every=3", "logger=files",
    "dataset.source.num_train=30", "dataset.source.num_eval=10",
]  # fmt: skip


@contextmanager
def mounted(folder, size):
    """A disk of its own; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an error holds on to open files


@contextmanager
def largest_file(size):
    """No file of this process beyond so many bytes, as `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


BIG = torch.zeros(500_000)
SAVE: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save(BIG, path.open("wb")),
    "a Rust library": lambda path: Tokenizer(
        models.WordLevel({f"word {i}": i for i in range(60_000)}, "word 0")
    ).save(str(path)),
    "safetensors": lambda path: save_file({"a": BIG}, path),
    "shards": lambda path: save_shards({"0.exp_avg": BIG}, path),
    "parquet": lambda path: pq.write_table(pa.table({"a": torch.rand(500_000).numpy()}), path),
    "text": lambda path: path.write_text("a" * 2_000_000),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("library", SAVE)
def test_every_library_says_which_file_and_why(library, tmp_path):
    def assert_said(folder, number):
        with pytest.raises(OSError, match=os.strerror(number)) as caught, name_disk_error(folder / "a"):
            SAVE[library](folder / "b")
        assert (caught.value.errno, caught.value.filename) == (number, str(folder / "a"))

    with largest_file(100_000):
        assert_said(tmp_path, errno.EFBIG)
    with mounted(tmp_path / "disk", "1m") as disk:
        assert_said(disk, errno.ENOSPC)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), stop_on_disk_error(tmp_path), name_disk_error(tmp_path):
        (tmp_path / "none" / "a").write_text("")
    assert find_disk_error(ValueError("os error 28")) is None
    for number in (errno.EIO, errno.EACCES, errno.EISDIR, errno.EEXIST):
        expected = f"{tmp_path}, or the output of this command, could not be written: {os.strerror(number)} ."
        with pytest.raises(RunFailed, match=expected), stop_on_disk_error(tmp_path):
            raise OSError(number, "in the library's words")
    with pytest.raises(RunFailed, match="without overwrite=true goes on"), stop_on_disk_error(tmp_path, True):
        raise OSError(errno.EIO, "in the library's words")


def test_a_row_and_a_file_are_written_whole_or_not_at_all(tmp_path):
    with FileIO(tmp_path / "rows", "a") as file:
        append_line(file, "first\n")
        with largest_file(10), pytest.raises(OSError, match="rows") as caught:
            append_line(file, "second row\n")
        append_line(file, "third\n")
    assert caught.value.errno == errno.EFBIG and (tmp_path / "rows").read_text() == "first\nthird\n"
    with FileIO("/dev/full", "a") as full, pytest.raises(OSError, match="/dev/full") as caught:
        append_line(full, "row\n")
    assert caught.value.errno == errno.ENOSPC
    with largest_file(10), pytest.raises(OSError, match="rows"), replace_file(tmp_path / "rows") as partial:
        partial.write_text("a" * 100)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first\nthird\n"]


def test_a_record_that_cannot_be_written_hides_no_error(tmp_path, composed):
    record = RunRecord(tmp_path, composed(*SMALL))
    with pytest.raises(ValueError, match="the reason"), largest_file(10), record:
        raise ValueError("the reason")
    assert run_status(tmp_path) == "interrupted"  # as after a kill: what is on disk says that it was running


def numbers(directory):
    return [*logged(directory / "metrics.jsonl"), *logged(directory / "eval.jsonl")]


def weights(directory):
    return load_file(directory / "checkpoints" / "step_000004" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(composed, tmp_path_factory):
    """A run that was left alone, in which no checkpoint is ahead of the rows on disk."""
    order: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, method in ((RunLogger, "sync"), (Checkpointer, "save")):
            genuine = getattr(owner, method)
            patch.setattr(owner, method, lambda *a, m=method, f=genuine: (order.append(m), f(*a))[1])
        directory = train.run(composed(*SMALL, f"output_dir={tmp_path_factory.mktemp('unbroken')}"))
    assert order == ["sync", "save", "sync", "save"]
    return directory


def assert_readable(directory):
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert all(json.loads(line) for line in (directory / name).read_text().splitlines())
    assert not list((directory / "checkpoints").glob(".*")) and not list(directory.rglob("*.partial"))


def assert_goes_on(directory, unbroken, run):
    """What a stopped run left is readable, and the same command comes to the same numbers."""
    assert_readable(directory)
    run()
    assert run_status(directory) == "finished"
    assert numbers(directory) == numbers(unbroken)
    expected, found = weights(unbroken), weights(directory)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(list((directory / "completions").iterdir())) == 4


WHERE = (
    (RunRecord, "update", "run.json"),
    (RunLogger, "log_step", ""),  # a row may fit into what its file has of the disk
    (RunLogger, "log_completions", "completions/step_000003.parquet"),
    (Checkpointer, "save", "checkpoints/step_000004"),
)
"""What is written when the disk is full, in the order in which a run that goes on comes to it."""


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_it_goes_on_bit_for_bit(unbroken, tmp_path, composed):
    with mounted(tmp_path / "disk", "64m") as disk:
        config = composed(*SMALL, f"output_dir={disk}")
        for owner, method, name in WHERE:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, method, filling(disk, getattr(owner, method)))
                with pytest.raises(RunFailed, match="No space left on device") as failed:
                    train.run(config)
            assert str(failed.value).startswith(f"{disk}/default/") and "\n" not in str(failed.value)
            assert f"{name} could not be written" in str(failed.value)
            assert "(0.0 MB free); step 2 is saved. " in str(failed.value)
            (directory,) = (disk / "default").glob("*")
            (disk / "filler").unlink()
            assert_readable(directory)
        assert_goes_on(directory, unbroken, lambda: train.run(config))


def filling(disk, genuine):
    """A method that fills the disk before the first thing that it does after a checkpoint."""

    def on_a_full_disk(*args, **kwargs):
        if saved(disk) and not (disk / "filler").exists():
            fill(disk)
        return genuine(*args, **kwargs)

    return on_a_full_disk


def saved(disk):
    return [
        path for path in disk.glob("default/*/checkpoints/step_*") if (path / "trainer_state.pt").exists()
    ]


@pytest.mark.slow
def test_the_command_says_it_in_one_line_and_exit_status_1(unbroken, tmp_path, capfd):
    command = [*SMALL, f"output_dir={tmp_path}"]
    with largest_file(5_000_000):  # the weights fit
        assert run_training(*command) == 1
    (directory,) = (tmp_path / "default").glob("*")
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{directory}/checkpoints/step_000002 could not be written: File too large (")
    assert "; nothing was saved yet. Make room" in line
    assert json.loads((directory / "run.json").read_text())["error"].startswith("RunFailed: ")
    assert_goes_on(directory, unbroken, lambda: run_training(*command))
