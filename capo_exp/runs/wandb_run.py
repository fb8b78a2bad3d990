"""The W&B run of one run directory. Nothing here holds an API key, and nothing here can stop a training run.

W&B's row i is row i of the files, whatever was killed, resumed or uploaded in between: each row is sent with
its number, and those that the server has are left out. Offline, W&B cannot resume: the run is written again
from the files into a new folder, unless an older one has been uploaded; then the new one goes on behind it,
which is how `wandb sync` puts them together. A run that was online and goes on offline becomes another one,
for an upload would send twice what the server has.
"""

import json
import logging
import math
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from capo_exp.config.schema import TrainConfig
from capo_exp.runs import metrics as names
from capo_exp.runs.wandb_file import history, is_whole
from capo_exp.runs.wandb_start import start

log = logging.getLogger(__name__)

BEST = "eval/best_accuracy"
"""In W&B's summary: the largest eval/accuracy. W&B's own maximum forgets what was before a resume."""

RECORD = "record"
"""In W&B's summary: run.json as it was when this process started."""

END_SECONDS = 5.0
"""How long W&B's process gets to write the end of an offline run; it takes some milliseconds."""


class WandbRun:
    """Owns the W&B run of a run directory; see the module."""

    def __init__(self, run_dir: Path, config: TrainConfig, run_id: str) -> None:
        """Starts the W&B run, or goes on with that of an earlier process, and sends the rows of the files.

        Args:
            run_dir: With metrics.jsonl and eval.jsonl cut at the checkpoint.
            config: Only `logger`, names and the values that W&B shows are read.
            run_id: Begins the id of a new W&B run; W&B's ids are shared by all who log to a project.

        Raises:
            ConfigError: W&B refuses, or cannot be reached and logger.wandb_mode is online.
        """
        self._run_dir, self._config, self._run_id = run_dir, config, run_id
        self._again = False
        self._record: Mapping[str, Any] = {}
        self._open()

    def _open(self) -> None:
        self._run = start(self._run_dir, self._config, self._id)
        self._run.define_metric(names.COMPLETIONS)
        self._run.define_metric("*", step_metric=names.COMPLETIONS)
        uploaded = _remove_older(self._run_dir, self._run)
        self._there = self._run.starting_step if self._run.resumed else _rows(uploaded)
        self._row, self._best = 0, -math.inf
        self._run.summary[RECORD] = dict(self._record)
        for row in logged_rows(self._run_dir):
            self._send(row)

    def _id(self, mode: str) -> str:
        """The earlier process's, if it can go on in this mode, else a new one."""
        last = next((file for folder in reversed(_folders(self._run_dir)) for file in _files(folder)), None)
        if last and (mode == "online" or last.parent.name.startswith("offline-")):
            return last.stem.removeprefix("run-")
        return f"{self._run_id}-{secrets.token_hex(2)}"

    def describe(self, record: Mapping[str, Any]) -> None:
        """Puts run.json into W&B's summary, so that an export has it: versions, machine, problems, commit."""
        self._record = record
        if self._run is not None:
            try:
                self._run.summary[RECORD] = dict(record)
            except Exception as error:
                self._reopen(error)

    def send(self, row: Mapping[str, float | None]) -> None:
        """Logs a row that is in the files already; a failure of W&B's is made up for from them, once."""
        if self._run is not None:
            try:
                self._send(row)
            except Exception as error:  # such as its process killed: whatever it is, training goes on
                self._reopen(error)

    def _send(self, row: Mapping[str, float | None]) -> None:
        assert self._run is not None
        if self._row >= self._there:
            numbers = {key: math.nan if value is None else value for key, value in row.items()}
            self._run.log(numbers, step=self._row, commit=True)
        self._row += 1
        accuracy = row.get(names.EVAL_ACCURACY)
        if accuracy is not None and accuracy > self._best:
            self._best = self._run.summary[BEST] = accuracy

    def _reopen(self, error: object) -> None:
        self._run = None
        with suppress(Exception):  # its connection may be gone, too
            import wandb

            wandb.teardown()
        if self._again:
            log.warning("W&B stopped again (%s): the run goes on without; the files have all of it", error)
            return
        self._again = True
        log.warning("W&B stopped (%s): its run is written again from the files", error)
        try:
            self._open()
        except Exception as second:
            log.warning("W&B does not start (%s): the run goes on without", second)
            self._run = None

    @property
    def location(self) -> str | None:
        """The run's URL, or the command that uploads it; None if W&B has given up."""
        if self._run is None:
            return None
        if not self._run.offline:
            return self._run.url
        return f"wandb sync {shlex.quote(str(self._run_dir / 'wandb'))}/offline-run-*"

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run; 0 means success. Then what W&B failed to write is written from the files."""
        lost = self._end(exit_code)
        if lost and exit_code == 0:  # else the resume does it
            self._reopen(lost)
            if lost := self._end(0):
                log.warning("W&B's run is not complete (%s); the files have all of it", lost)

    def _end(self, exit_code: int) -> object:
        """What is wrong with the W&B run after its end, if anything."""
        run, self._run = self._run, None
        if run is None:
            return None
        file = Path(run.dir).parent / f"run-{run.id}.wandb"
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:  # such as its process killed
            return error
        deadline = time.monotonic() + END_SECONDS
        while run.offline and exit_code == 0 and not is_whole(file):
            if time.monotonic() > deadline:
                return f"{file} has no end"
            time.sleep(0.01)
        return None


def logged_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl and eval.jsonl in the order they were logged in: an evaluation comes after
    the training step that it follows."""
    rows = []
    for place, name in enumerate(("metrics.jsonl", "eval.jsonl")):
        lines = (run_dir / name).read_text(encoding="utf-8").splitlines() if (run_dir / name).exists() else []
        rows += [(row[names.STEP], place, row) for row in map(json.loads, lines)]
    yield from (row for _, _, row in sorted(rows, key=lambda item: item[:2]))


def _folders(run_dir: Path) -> list[Path]:
    """What W&B has written for this run, oldest first."""
    folders = [path for path in (run_dir / "wandb").glob("*run-*") if not path.is_symlink()]
    return sorted(folders, key=lambda path: re.sub(r"^offline-", "", path.name))


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("run-*.wandb"))


def _remove_older(run_dir: Path, run: Any) -> list[Path]:
    """Removes what the current W&B run has, too; gives the folders that an offline one goes on behind."""
    current = Path(run.dir).parent.resolve()
    older = [folder for folder in _folders(run_dir) if folder.resolve() != current]
    begun = [folder for folder in older if any(folder.glob(f"run-{run.id}.wandb.sync*"))]  # to be uploaded
    uploaded = [folder for folder in begun if run.offline and folder.name.startswith("offline-")]
    for folder in older:
        if folder not in uploaded:
            shutil.rmtree(folder)
    return uploaded


def _rows(folders: Sequence[Path]) -> int:
    files = [file for folder in folders for file in _files(folder)]
    return max((int(row["_step"]) + 1 for file in files for row in history(file)), default=0)
