"""A run of W&B. Nothing here reads an API key. Online, a resume leaves out the rows that the server has."""

import math
import netrc
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.files import keep_id
from capo_exp.runs.parse import read_yaml
from capo_exp.runs.record import read_record
from capo_exp.runs.samples import Sample

BEST = "eval/best_accuracy"
"""Key of W&B's summary: the largest eval/accuracy. W&B's own maximum forgets what was before a resume."""

RECORD = "record"
"""Key of W&B's summary: run.json as it was when W&B's run was opened."""

MARGIN = 1_000_000
"""Free bytes [B] with which all of an offline run has been written."""

TABLE_ROWS = 8
"""About how many completions of a step W&B gets, spread over its prompts: its tables are not compressed."""

HISTOGRAM_BINS = 32

TAG_LENGTH = 64
"""Most characters of a tag that W&B takes."""

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


class WandbSink:
    """Owns an open W&B run, online or offline."""

    def __init__(self, folder: Path, mode: Any, *, stats: bool, table_rows: int, **about: Any) -> None:
        """Opens it; an offline one takes the place of those that an earlier process wrote.

        Args:
            folder: takes `wandb`.
            mode: online | offline | disabled.
            stats: whether the load of the machine is sent.
            table_rows: about how many rows of a table are sent, spread over all.
            about: further arguments of wandb.init.
        """
        import wandb

        if not (folder / "wandb").is_symlink():  # else they may be another's
            for old in (folder / "wandb").glob("offline-run-*"):  # a part of what is sent now
                shutil.rmtree(old)
        self._folder, self._mode, self._table_rows = folder, mode, table_rows
        settings = _quiet_settings(stats=stats)
        # "create_new": two runs in one process never share
        self.run = wandb.init(mode=mode, dir=folder, reinit="create_new", settings=settings, **about)
        self.there = self.run.starting_step if self.run.resumed else 0
        self._rows, self._best = 0, -math.inf

    @property
    def location(self) -> str:
        """The run's URL, or the command that uploads it."""
        url = self.run.url if self._mode == "online" else ""  # asked offline, W&B prints a warning
        return url or sync_command(self._folder)

    def log(self, number: int, x: int, row: Mapping[str, float], sample: Sample | None) -> None:
        """Sends a row, with a table of completions and histograms beside its numbers."""
        self._rows = number + 1
        if number >= self.there:
            self.run.log({**row, **self._media(number, sample)}, step=number, commit=True)
        if (accuracy := row.get(names.EVAL_ACCURACY, -math.inf)) > self._best:
            self._best = self.run.summary[BEST] = accuracy

    def finish(self, exit_code: int, media: Sequence[Path]) -> None:
        """Sends pictures and pages as a row of their own, the last, and ends the run."""
        import wandb

        shown: dict[str, Any] = {f"run/{path.stem}": str(path) for path in media}
        for key, path in shown.items():  # a page as it is, since its policy forbids what W&B would put in
            shown[key] = wandb.Html(path, inject=False) if path.endswith(".html") else wandb.Image(path)
        if shown:
            self.run.log(shown, step=self._rows, commit=True)
        self.run.finish(exit_code=exit_code)
        free = shutil.disk_usage(self._folder).free
        if self._mode == "offline" and free < MARGIN:  # where W&B writes what fits, and is silent
            raise OSError(f"{free / 1e6:.1f} MB are free, so that it may have been cut short")

    def _media(self, number: int, sample: Sample | None) -> dict[str, Any]:
        if sample is None:
            return {}
        import wandb

        rows: Any = sample.rows[:: max(1, len(sample.rows) // self._table_rows)]
        table = wandb.Table(list(sample.columns), rows, allow_mixed_types=True)
        # Bound now, it is a file of the run; else W&B would make an artifact of it, in the user's home.
        table.bind_to_run(self.run, sample.name, number)
        shown: dict[str, Any] = {sample.name: table}
        for key, values in sample.histograms.items():
            counts, edges = np.histogram(values, HISTOGRAM_BINS)
            shown[key] = wandb.Histogram(np_histogram=(counts, np.round(edges, 6)))
        return shown


def open_training(run_dir: Path, mode: str) -> WandbSink:
    """Opens the W&B run of a run directory."""
    config = read_yaml(run_dir / "config.yaml")
    record = read_record(run_dir) or {}
    sink = WandbSink(
        run_dir,
        mode,
        stats=mode == "online",  # the machine is watched as the run goes on or never
        table_rows=TABLE_ROWS,
        id=_wandb_id(run_dir, record["run_id"], mode),
        resume="allow" if mode == "online" else None,  # offline W&B would only warn
        project=config["logger"]["project"],
        group=config["experiment_name"],
        job_type="train",
        name=record["name"],
        tags=[*config["logger"]["tags"], *_describe(config)],
        config=config,
    )
    sink.run.define_metric(names.COMPLETIONS)
    sink.run.define_metric("*", step_metric=names.COMPLETIONS)
    sink.run.summary[RECORD] = record
    return sink


def sync_command(folder: Path) -> str:
    """Returns the command that uploads what was written offline."""
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def write_command(folder: Path) -> str:
    """Returns the command that writes the offline run of a run directory anew."""
    return f"python scripts/write_wandb.py {shlex.quote(str(folder))}"


def _quiet_settings(*, stats: bool) -> Any:
    """Returns settings with which W&B says nothing, and sends no more than it is given and, with `stats`, the
    load of the machine."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",  # wrapped pipes have hung runs
        init_timeout=30,
        disable_code=True,
        disable_git=True,  # run.json has the git state
        host="",
        x_disable_meta=True,
        x_disable_stats=not stats,
        x_save_requirements=False,
        x_stats_sampling_interval=MACHINE_SECONDS,
    )


def _describe(config: dict[str, Any]) -> list[str]:
    """Returns the tags that every run has: method, model, dataset, regime, seed."""
    parts = [config[group]["name"] for group in ("algo", "model", "dataset", "regime")]
    put_on = [config["algo"].get(key) for key in ("variant", "step_rule_name")]  # older runs have neither
    tags = ["-".join(filter(None, [parts[0], *put_on])), *parts[1:], f"seed {config['seed']}"]
    return [tag[:TAG_LENGTH] for tag in tags]


def _wandb_id(run_dir: Path, run_id: str, mode: str) -> str:
    """Returns an id of this run directory alone: W&B's ids are shared by all who log to a project.

    An online run keeps its id. An offline one is always new: of an earlier one the server may have a part.
    """
    new = f"{run_id}-{secrets.token_hex(2)}"
    return keep_id(run_dir / "wandb" / "online_id", new) if mode == "online" else new
