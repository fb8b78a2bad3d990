"""Metrics, evaluations and sampled completions of one run: plain files first, a tracker beside them."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.files import append_line, name_disk_error, replace_file, write_atomic
from capo_exp.runs.read import find_samples
from capo_exp.runs.trackers import Tracker
from capo_exp.runs.wandb_sink import resolve_mode

log = logging.getLogger(__name__)

Draw = Callable[[Path], Sequence[Path]]
"""Makes the pictures and pages of a run directory from its files, and returns their paths."""

COMPLETION_TYPES = {
    "token_ids": pa.list_(pa.int32()),
    "tokens": pa.list_(pa.string()),
    "log_prob": pa.list_(pa.float32()),
    "policy_shift": pa.list_(pa.float32()),
    "objective_shift": pa.list_(pa.float32()),
    "keep": pa.list_(pa.bool_()),
}
"""Columns with one entry per completion token; the others get their type from their values."""

SIGNIFICANT_BITS = 8
"""Precision of a float per token: 0.4 %, as in bfloat16. The other 16 bits are most of a file, and noise."""


class RunLogger:
    """Owns metrics.jsonl, eval.jsonl, completions/ and the tracker's run of one run directory."""

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int,
        wandb_mode: str,
        tracker: str = "wandb",
        draw: Draw | None = None,
    ) -> None:
        """Opens the files behind the checkpoint of `resume_step` (0 = none), and drops what was logged later.

        For a tracker the run's config.yaml and run.json have to be there.

        Args:
            run_dir: the directory of the run.
            resume_step: the rollout step that it goes on after.
            wandb_mode: auto | online | offline | disabled.
            tracker: files (none) | wandb | tensorboard | trackio.
            draw: makes the pictures and pages of a run that has ended well.

        Raises:
            ConfigError: A line of the files is not a row, or W&B refuses.
        """
        self.run_dir, self._draw = run_dir, draw
        last = max(_cut_rows(run_dir / "metrics.jsonl", resume_step), default=0)
        self.evaluated_step = max(_cut_rows(run_dir / "eval.jsonl", resume_step), default=-1)
        _cut_completions(run_dir, resume_step)
        if last < resume_step:
            log.warning("%s: rows of steps %s to %s are missing", run_dir, last + 1, resume_step)
        self._tracker: Tracker | None = None
        if tracker != "files" and not (tracker == "wandb" and resolve_mode(wandb_mode) == "disabled"):
            self._tracker = Tracker(run_dir, tracker, wandb_mode)
        self._metrics = FileIO(run_dir / "metrics.jsonl", "a")
        self._evaluations = FileIO(run_dir / "eval.jsonl", "a")

    def log_step(self, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of one rollout step to metrics.jsonl and the tracker.

        Its completions come before.
        """
        self._append(self._metrics, metrics)

    def log_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Appends the scores of one evaluation to eval.jsonl and the tracker."""
        self._append(self._evaluations, metrics)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes completions/step_<step>.parquet, one row per completion; every row has the same columns.

        Floats per token are rounded to SIGNIFICANT_BITS.
        """
        folder = self.run_dir / "completions"
        folder.mkdir(exist_ok=True)
        columns = {key: _column(key, [row[key] for row in rows]) for key in rows[0]} if rows else {}
        with replace_file(folder / f"step_{step:06d}.parquet") as partial:
            pq.write_table(
                pa.table(columns),
                partial,
                compression="zstd",
                compression_level=15,
                use_dictionary=False,  # zstd finds the phrases that a group's completions share
                use_byte_stream_split=[  # pyright: ignore[reportArgumentType]
                    f"{key}.list.element" for key in columns if _is_floats(key)
                ],
            )

    def sync(self) -> None:
        """Forces the rows to disk: a checkpoint does not go beyond them, even after a power cut."""
        for file in (self._metrics, self._evaluations):
            with name_disk_error(Path(str(file.name))):
                os.fsync(file)

    @property
    def tracker_location(self) -> str | None:
        """Where the tracker shows the run, or the command that uploads it; None without one."""
        return self._tracker and self._tracker.location

    def finish(self, exit_code: int) -> None:
        """Closes the files, draws the run and ends the tracker's; 0 means success.

        A second call does nothing.
        """
        if self._metrics.closed:
            return
        self._metrics.close()
        self._evaluations.close()
        media = try_to_draw(self._draw, self.run_dir) if exit_code == 0 and self._draw else ()
        if self._tracker is not None:
            self._tracker.finish(exit_code, media)

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.finish(0 if error is None else 1)

    def _append(self, file: FileIO, metrics: Mapping[str, float]) -> None:
        names.check_known(metrics)
        assert {names.STEP, names.COMPLETIONS} <= metrics.keys(), f"no {names.STEP} or {names.COMPLETIONS}"
        row = {
            key: None if not math.isfinite(value) else value if isinstance(value, int) else float(value)
            for key, value in metrics.items()
        }
        append_line(file, json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
        if self._tracker is not None:
            self._tracker.send(row)


def _is_floats(key: str) -> bool:
    return COMPLETION_TYPES.get(key) == pa.list_(pa.float32())


def _column(key: str, values: Sequence[Any]) -> pa.Array:
    if not _is_floats(key):
        return pa.array(values, COMPLETION_TYPES.get(key))
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    mantissa, exponent = np.frexp(np.concatenate(values, dtype=np.float32))
    rounded = np.ldexp(np.round(mantissa * 2**SIGNIFICANT_BITS) / 2**SIGNIFICANT_BITS, exponent)
    return pa.ListArray.from_arrays(ends, pa.array(rounded, pa.float32()))


def _cut_rows(path: Path, step: int) -> list[int]:
    """Keeps the rows of a .jsonl file up to a rollout step, none if it is 0, and returns their steps.

    Raises:
        ConfigError: A line before that step is not a row.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if step > 0 and path.exists() else []
    steps: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            at = int(json.loads(line)[names.STEP])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected one JSON object with {names.STEP} ({error}); "
                "mend or remove the line, or start again with overwrite=true"
            ) from None
        if at > step:
            break
        steps.append(at)
    write_atomic(path, "".join(f"{line.decode()}\n" for line in lines[: len(steps)]))
    return steps


def _cut_completions(run_dir: Path, step: int) -> None:
    """Removes samples of rollout steps beyond `step`, and what a kill left of one."""
    late = [path for number, path in find_samples(run_dir).items() if number > step]
    for path in (*late, *(run_dir / "completions").glob(".*.partial")):
        path.unlink()


def try_to_draw(draw: Draw, run_dir: Path) -> Sequence[Path]:
    """Draws a run's pictures; warns where they cannot be drawn, since the run is whole without."""
    try:
        return draw(run_dir)
    except Exception as error:
        log.warning("%s: no picture could be drawn (%s)", run_dir, error)
        return ()
