"""W&B, made from a run's own files. Nothing here reads an API key, and nothing here can stop a training run.

W&B's row i is row i of the files. Online the rows go out as they are logged, and a resume leaves out those
that the server has. Offline, or where W&B has failed, nothing happens until the process ends: then the whole
run is written from the files, for `wandb sync` to upload. `python scripts/write_wandb.py DIR` writes it for
one whose process was killed, or whose disk was full then.
"""

import json
import logging
import math
import netrc
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capo_exp.config.errors import ConfigError
from capo_exp.config.record import read_values
from capo_exp.runs import metrics as names
from capo_exp.runs.read import LoggedRow, read_jsonl
from capo_exp.runs.record import read_record

log = logging.getLogger(__name__)

BEST = "eval/best_accuracy"
"""Key of W&B's summary: the largest eval/accuracy. W&B's own maximum forgets what was before a resume."""

RECORD = "record"
"""Key of W&B's summary: run.json as it was when W&B's run was opened."""

BLOCK = 32_768
"""Bytes of a block in W&B's file, each of which begins with 7 of its own."""

MACHINE_SECONDS = 300.0
"""Time between W&B's looks at the machine: at its own 15 s they outgrow a run's metrics if steps are long."""


def resolve_mode(mode: str) -> str:
    """Returns online | offline | disabled; `auto` follows WANDB_MODE, else asks whether a key is there.

    Raises:
        ConfigError: The mode is unknown.
    """
    chosen = (os.environ.get("WANDB_MODE") or "auto") if mode == "auto" else mode
    if chosen == "auto":
        chosen = "online" if has_key() else "offline"
    if chosen not in ("online", "offline", "disabled"):
        key = "logger.wandb_mode" if mode == chosen else "the environment variable WANDB_MODE"
        raise ConfigError(f"{key}={chosen}: expected auto, online, offline or disabled")
    return chosen


def has_key() -> bool:
    """Returns whether W&B credentials are in the environment or in ~/.netrc; asks no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    servers = {os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url, "https://api.wandb.ai"}
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
        return any((known.authenticators(urlsplit(url).netloc) or ("", "", ""))[2] for url in servers)
    return False


class WandbRun:
    """Owns the W&B run of a run directory, which has config.yaml and run.json; see the module."""

    def __init__(self, run_dir: Path, mode: str) -> None:
        """Opens the W&B run if it is online and sends the rows that it lacks.

        Raises:
            ConfigError: W&B refuses or cannot be reached, and the mode is online; `auto` goes on offline.
        """
        self._run_dir = run_dir
        self._run: Any = None
        if resolve_mode(mode) == "online":
            import wandb

            try:
                self._open("online")
            except wandb.Error as error:
                if mode == "online":
                    raise ConfigError(f"no W&B ({error}); or use logger.wandb_mode=offline") from error
                self._give_up(str(error).splitlines()[0])

    def send(self, row: Mapping[str, float | None]) -> None:
        """Sends a row that is in the files already; after a failure the run goes on offline."""
        if self._run is not None:
            try:
                self._log(row)
            except Exception as error:  # such as its process killed: whatever it is, training goes on
                self._give_up(error)

    @property
    def location(self) -> str:
        """The run's URL, or the command that uploads it once the process has ended."""
        if self._run is not None:
            return self._run.url
        return f"wandb sync {shlex.quote(str(self._run_dir / 'wandb'))}/offline-run-*"

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run, 0 means success; an offline one is written here, the whole of it."""
        try:
            if self._run is not None:
                self._run.finish(exit_code=exit_code)
                return
            self._open("offline").finish(exit_code=exit_code)
            _check_whole(self._run_dir)
        except Exception as error:
            again = f"`python scripts/write_wandb.py {shlex.quote(str(self._run_dir))}` writes it"
            log.warning("W&B's run is not complete (%s); the files have all of it, %s", error, again)

    def _open(self, mode: str) -> Any:
        for old in (self._run_dir / "wandb").glob("offline-run-*"):  # a part of what is sent now
            shutil.rmtree(old)
        self._run = _init(self._run_dir, mode)
        self._run.define_metric(names.COMPLETIONS)
        self._run.define_metric("*", step_metric=names.COMPLETIONS)
        self._run.summary[RECORD] = read_record(self._run_dir)
        self._there = self._run.starting_step if self._run.resumed else 0
        self._row, self._best = 0, -math.inf
        for row in read_logged(self._run_dir):
            self._log(row)
        return self._run

    def _log(self, row: Mapping[str, float | None]) -> None:
        if self._row >= self._there:
            numbers = {key: math.nan if value is None else value for key, value in row.items()}
            self._run.log(numbers, step=self._row, commit=True)
        self._row += 1
        accuracy = row.get(names.EVAL_ACCURACY)
        if accuracy is not None and accuracy > self._best:
            self._best = self._run.summary[BEST] = accuracy

    def _give_up(self, error: object) -> None:
        log.warning("no W&B (%s): the run goes on offline, upload it later with `wandb sync`", error)
        self._run = None
        with suppress(Exception):  # its connection may be gone, too; and it still owns the id
            import wandb

            wandb.teardown()


def read_logged(run_dir: Path) -> list[LoggedRow]:
    """Returns the rows of both files as they were logged: an evaluation after the training step before it."""
    rows = [*read_jsonl(run_dir / "metrics.jsonl"), *read_jsonl(run_dir / "eval.jsonl")]
    return sorted(rows, key=lambda row: row[names.STEP])  # which keeps the order within a step


def _check_whole(run_dir: Path) -> None:
    """Looks for the numbers of the last row at the end of W&B's file, for W&B is silent on a full disk."""
    if shutil.disk_usage(run_dir).free > 1_000_000:  # W&B may still be writing when it says that it is done
        return
    rows = read_logged(run_dir)[-1:]
    for path in (run_dir / "wandb").glob("offline-run-*/run-*.wandb"):
        data = path.read_bytes()
        blocks = b"".join(data[start + 7 : start + BLOCK] for start in range(0, len(data), BLOCK))
        numbers = [json.dumps(value).encode() for row in rows for value in row.values() if value is not None]
        if not all(number in blocks for number in numbers):
            raise OSError(f"{path} was cut short")


def _init(run_dir: Path, mode: Any) -> Any:
    import wandb

    config = read_values((run_dir / "config.yaml").read_text(encoding="utf-8"), str(run_dir))
    record = read_record(run_dir) or {}
    return wandb.init(
        id=_wandb_id(run_dir, record["run_id"], mode),
        resume="allow" if mode == "online" else None,  # offline W&B would only warn
        reinit="create_new",  # two runs in one process never share
        mode=mode,
        project=config["logger"]["project"],
        group=config["experiment_name"],
        job_type="train",
        name=record["name"],
        tags=config["logger"]["tags"],
        config=config,
        dir=run_dir,
        settings=wandb.Settings(
            silent=True,
            console="off",  # wrapped pipes have hung runs
            init_timeout=30,
            disable_code=True,
            disable_git=True,  # run.json has the git state
            host="",
            x_disable_meta=True,
            x_disable_stats=mode == "offline",  # the machine is watched while the run goes on or not at all
            x_save_requirements=False,
            x_stats_sampling_interval=MACHINE_SECONDS,
        ),
    )


def _wandb_id(run_dir: Path, run_id: str, mode: str) -> str:
    """Returns an id of this run directory alone: W&B's ids are shared by all who log to a project.

    An online run keeps its id. An offline one is always new: of an earlier one the server may have a part.
    """
    kept = run_dir / "wandb" / "online_id"
    if mode == "online" and kept.exists():
        return kept.read_text(encoding="utf-8")
    new = f"{run_id}-{secrets.token_hex(2)}"
    if mode == "online":
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(new, encoding="utf-8")
    return new
