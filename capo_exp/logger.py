"""Metrics, evaluations and sampled completions of one run: plain files first, Weights & Biases beside them.

The W&B run has what the files have. Offline, W&B cannot resume: the run is written again from the files into
one new W&B folder, so that `wandb sync` uploads the whole curve; the older folders of the run are removed.
Nothing here holds an API key.
"""

import json
import logging
import math
import netrc
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from capo_exp import metric_names as names
from capo_exp.config import ConfigError, TrainConfig
from capo_exp.run_record import as_dict, replacing, run_name, write_atomic

log = logging.getLogger(__name__)

COMPLETION_TYPES = {
    "token_ids": pa.list_(pa.int64()),
    "tokens": pa.list_(pa.string()),
    "log_prob": pa.list_(pa.float32()),
    "policy_shift": pa.list_(pa.float32()),
    "objective_shift": pa.list_(pa.float32()),
    "keep": pa.list_(pa.bool_()),
}
"""Columns with one entry per completion token; the others get their type from their values."""


class RunLogger:
    """Owns metrics.jsonl, eval.jsonl, completions/ and the W&B run of one run directory."""

    def __init__(self, run_dir: Path, config: TrainConfig, *, run_id: str, resume_step: int) -> None:
        """Opens the files behind the checkpoint that training goes on from.

        Args:
            run_dir: Must exist.
            config: Only `logger`, names and the values that W&B shows are read.
            run_id: W&B run id; the same after a resume.
            resume_step: Rollout steps in the checkpoint; what was logged later is dropped, everything if 0.
        """
        self.run_dir = run_dir
        kept = {name: drop_after(run_dir / name, resume_step) for name in ("metrics.jsonl", "eval.jsonl")}
        drop_completions_after(run_dir / "completions", resume_step)
        self.evaluated_step = max((row[names.STEP] for row in kept["eval.jsonl"]), default=-1)
        self._wandb = start_wandb(run_dir, config, run_id=run_id, resume=resume_step > 0)
        if self._wandb is not None and not self._wandb.resumed:
            remove_older_wandb_runs(run_dir, self._wandb)
            for row in sorted([*kept["eval.jsonl"], *kept["metrics.jsonl"]], key=lambda row: row[names.STEP]):
                self._send(row)
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._evaluations = (run_dir / "eval.jsonl").open("a", encoding="utf-8")

    def log_step(self, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of one rollout step to metrics.jsonl and W&B."""
        self._append(self._metrics, metrics)

    def log_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Appends the scores of one evaluation to eval.jsonl and W&B."""
        self._append(self._evaluations, metrics)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes completions/step_<step>.parquet, one row per completion; every row has the same columns."""
        folder = self.run_dir / "completions"
        folder.mkdir(exist_ok=True)
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
        arrays = {key: pa.array(values, COMPLETION_TYPES.get(key)) for key, values in columns.items()}
        with replacing(folder / f"step_{step:06d}.parquet") as partial:
            pq.write_table(pa.table(arrays), partial)

    @property
    def wandb_location(self) -> str | None:
        """Where the W&B run is: its URL, the command that uploads it, or None if W&B is disabled."""
        if self._wandb is None:
            return None
        return f"wandb sync {Path(self._wandb.dir).parent}" if self._wandb.offline else self._wandb.url

    def finish(self, exit_code: int) -> None:
        """Closes the files and the W&B run; 0 means success. A second call does nothing."""
        self._metrics.close()
        self._evaluations.close()
        run, self._wandb = self._wandb, None
        if run is not None:
            run.finish(exit_code=exit_code)

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.finish(0 if error is None else 1)

    def _append(self, file: Any, metrics: Mapping[str, float]) -> None:
        names.check_known(metrics)
        assert {names.STEP, names.COMPLETIONS} <= metrics.keys(), f"no {names.STEP} or {names.COMPLETIONS}"
        row = {key: _plain(value) for key, value in metrics.items()}
        file.write(json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
        file.flush()
        self._send(row)

    def _send(self, row: Mapping[str, float | None]) -> None:
        if self._wandb is not None:  # no step=: W&B drops rows whose step is not larger than the last
            self._wandb.log({key: value for key, value in row.items() if value is not None})


def _plain(value: float) -> float | int | None:
    """A number as JSON has it: exact, and null where it is not finite."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keeps the rows of a .jsonl file up to a rollout step, none if it is 0; a line cut short goes too."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [(line, json.loads(line)) for line in lines]
    kept = [(line, row) for line, row in rows if row[names.STEP] <= step and step > 0]
    write_atomic(path, "".join(line + "\n" for line, _ in kept))
    return [row for _, row in kept]


def drop_completions_after(folder: Path, step: int) -> None:
    """Removes samples of rollout steps beyond `step`."""
    for path in folder.glob("step_*.parquet"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def resolve_mode(mode: str) -> str:
    """online | offline | disabled; `auto` follows WANDB_MODE, else asks whether a key is there.

    Raises:
        ConfigError: The mode is unknown.
    """
    chosen = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    if chosen == "auto":
        chosen = "online" if has_key() else "offline"
    if chosen not in ("online", "offline", "disabled"):
        raise ConfigError(f"logger.wandb_mode is {chosen!r}; expected auto, online, offline or disabled")
    return chosen


def has_key() -> bool:
    """True if W&B credentials are configured; looks at the environment and ~/.netrc, asks no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    servers = {os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url, "https://api.wandb.ai"}
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
        return any((known.authenticators(urlsplit(url).netloc) or ("", "", ""))[2] for url in servers)
    return False


def start_wandb(run_dir: Path, config: TrainConfig, *, run_id: str, resume: bool) -> Any | None:
    """Starts the W&B run; None if disabled (then wandb is not imported).

    `auto` falls back to offline when the server cannot be reached.

    Raises:
        ConfigError: wandb_mode=online and W&B refuses or cannot be reached.
    """
    mode = resolve_mode(config.logger.wandb_mode)
    if mode == "disabled":
        return None
    import wandb

    try:
        run = _init(run_dir, config, run_id=run_id, mode=mode, resume="allow" if resume else None)
    except wandb.Error as error:
        if config.logger.wandb_mode == "online" or mode == "offline":
            raise ConfigError(f"W&B did not start ({error}); or use logger.wandb_mode=offline") from error
        reason = str(error).splitlines()[0]
        log.warning("no W&B (%s): the run goes on offline, upload it later with `wandb sync`", reason)
        wandb.teardown()  # the failed attempt still owns the run id
        run = _init(run_dir, config, run_id=run_id, mode="offline", resume=None)
    run.define_metric(names.COMPLETIONS)
    run.define_metric("*", step_metric=names.COMPLETIONS)
    return run


def _init(run_dir: Path, config: TrainConfig, *, run_id: str, mode: Any, resume: Any) -> Any:
    import wandb

    return wandb.init(
        id=run_id,
        resume=None if mode == "offline" else resume,  # offline the whole run is written again, see RunLogger
        reinit="create_new",  # jobs of one Hydra process never share a run
        mode=mode,
        project=config.logger.project,
        group=config.experiment_name,
        job_type="train",
        name=run_name(config),
        tags=list(config.logger.tags),
        config=as_dict(config),
        dir=run_dir,
        settings=wandb.Settings(
            silent=True,
            console="off",  # wrapped pipes have hung runs
            init_timeout=30,
            disable_code=True,
            disable_git=True,  # run.json has the git state
            host="",
            x_disable_meta=True,
            x_save_requirements=False,
        ),
    )


def remove_older_wandb_runs(run_dir: Path, run: Any) -> None:
    """Removes what earlier processes of the run wrote for W&B; the current folder has all of it."""
    current = Path(run.dir).parent
    older: Iterable[Path] = (run_dir / "wandb").glob(f"*run-*-{run.id}*")
    for folder in older:
        if folder.resolve() != current.resolve():
            shutil.rmtree(folder)
