"""Reads what a run left on disk. Runs may be short, unfinished, or older than a metric. Imports no torch."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.record import read_record, run_status

LoggedRow = Mapping[str, Any]
Array = NDArray[np.float64]

MARKS = {"run.json", "metrics.jsonl"}
"""A folder with one of these files is a run directory."""

EXPECTED = "expected a directory with runs, such as outputs, or a run's own, with run.json or metrics.jsonl"


@dataclass(frozen=True)
class LoggedRun:
    """One run directory in memory."""

    path: Path
    config: dict[str, Any]
    """config.yaml; empty if missing."""
    record: dict[str, Any]
    """run.json; empty if missing."""
    metrics: list[LoggedRow]
    """metrics.jsonl, one row an optimiser step; empty before the first."""
    evaluations: list[LoggedRow]
    """eval.jsonl, one row an evaluation of training; then evaluations/test.jsonl, one row a checkpoint that
    `python -m capo_exp.evaluate` has tested, by the cards that it used last."""

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns a config value by its dotted key, such as `algo.selection.policy_shift_max`."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.path.name

    @property
    def state(self) -> str:
        """What it is now: absent (no run.json) | running | finished | failed | interrupted."""
        return run_status(self.path)


def find_runs(patterns: Sequence[str | Path]) -> list[Path]:
    """Returns run directories, each once, in order of their paths.

    Args:
        patterns: Each is a run directory, a file in it, a folder with runs at any depth, or a glob of these.
            Hidden folders, and what is inside a run directory, are not searched.

    Raises:
        ConfigError: A pattern matches nothing on disk, or there is no run in any of them.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        for place in _places(str(pattern)):
            for run in _runs_in(place):
                found.setdefault(os.path.realpath(run), run)
    if not found:
        what = ", ".join(map(str, patterns)) or "no folder given"
        raise ConfigError(f"{what}: no run there; {EXPECTED}")
    return sorted(found.values())


def _places(pattern: str) -> list[Path]:
    """Returns what is on disk under a name or, if there is nothing of that name, a glob."""
    text = os.path.expanduser(pattern)
    if os.path.exists(text):
        return [Path(text)]
    matches = sorted(glob(text, recursive=True))
    if not matches:
        raise ConfigError(f"{pattern or 'an empty name'}: no such file or directory; {EXPECTED}")
    return [Path(match) for match in matches]


def _runs_in(place: Path) -> Iterator[Path]:
    if place.is_file():
        if not MARKS.isdisjoint(os.listdir(place.parent)):
            yield place.parent
        return
    seen: set[str] = set()  # a link can lead back up
    for folder, folders, files in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        is_run = not MARKS.isdisjoint(files)
        folders[:] = [] if is_run or real in seen else [name for name in folders if name[0] != "."]
        seen.add(real)
        if is_run:
            yield Path(folder)


def load_run(run_dir: Path | str) -> LoggedRun:
    """Reads a run directory as far as it is.

    Raises:
        FileNotFoundError: There is neither a metrics.jsonl nor a run.json.
        ConfigError: A file is damaged.
    """
    path = Path(run_dir)
    if not any((path / mark).exists() for mark in MARKS):
        raise FileNotFoundError(f"{path} has no metrics.jsonl; expected the directory of one run")
    return LoggedRun(
        path=path,
        config=_yaml(path / "config.yaml"),
        record=read_record(path) or {},
        metrics=read_jsonl(path / "metrics.jsonl") or _archived(path / "metrics.parquet"),
        evaluations=[*read_jsonl(path / "eval.jsonl"), *_tests(path / "evaluations" / "test.jsonl")],
    )


def to_its_end(run: LoggedRun) -> LoggedRun:
    """Returns a run that ended for want of reward (stop_after_unrewarded) with the steps that it left out.

    They have a reward and an accuracy of 0; its last evaluation stands at the end, too. Other runs stay
    as they are.
    """
    left_out = _left_out(run)
    if not left_out:
        return run
    evaluations = [*run.evaluations, {**run.evaluations[-1], **left_out[-1]}] if run.evaluations else []
    return replace(run, metrics=[*run.metrics, *left_out], evaluations=evaluations)


def _left_out(run: LoggedRun) -> list[LoggedRow]:
    if run.record.get("status") != "finished" or not run.metrics:
        return []
    last = run.metrics[-1]
    if not last.get(names.UNREWARDED_STEPS):
        return []
    step, completions = int(last[names.STEP]), last[names.COMPLETIONS]
    batch = run.setting("regime.prompts_per_step") * run.setting("regime.group_size")
    batch *= last.get("rollout/sampling_rounds", 1)  # as often as it sampled in vain
    zero = {names.TRAIN_ACCURACY: 0.0, names.TRAIN_REWARD: 0.0}
    return [
        {names.STEP: at, names.COMPLETIONS: completions + (at - step) * batch, **zero}
        for at in range(step + 1, run.setting("num_steps") + 1)
    ]


def _tests(path: Path) -> list[LoggedRow]:
    """Returns the rows of the benchmarks that were tested last; others are other questions."""
    rows = read_jsonl(path)
    return [row for row in rows if row.get("cards") == rows[-1].get("cards")]


def read_jsonl(path: Path) -> list[LoggedRow]:
    """Returns the rows of a .jsonl file: none if it is missing, without a last line that a kill cut short.

    Raises:
        ConfigError: Another line is not a JSON object.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _object(text: bytes, where: str) -> LoggedRow:
    try:
        row = json.loads(text)
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(f"{where}: not JSON ({error}); remove the line, or the run") from None
    if isinstance(row, dict):
        return row
    raise ConfigError(f"{where}: got {str(row)[:40]}, expected a JSON object; remove the line, or the run")


def load_completions(run: LoggedRun, step: int | None = None) -> list[LoggedRow]:
    """Returns sampled completions in the order of their steps, each with its `step`.

    Args:
        run: The run; older ones lack some columns.
        step: The rollout step; None = all that are on disk.

    Raises:
        ConfigError: A file is damaged.
    """
    files = {int(path.stem[5:]): path for path in (run.path / "completions").glob("step_[0-9]*.parquet")}
    wanted = sorted(files) if step is None else [step] if step in files else []
    return [{**row, "step": number} for number in wanted for row in _parquet(files[number])]


def _archived(path: Path) -> list[LoggedRow]:
    """Returns rows from what scripts/archive_runs.py made of them: no value is no key, NaN is null."""
    rows = _parquet(path) if path.exists() else []
    known = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return [{key: None if value != value else value for key, value in row.items()} for row in known]


def _parquet(path: Path) -> list[LoggedRow]:
    import pyarrow.parquet as pq  # here, so that whoever reads no completions does not wait for it

    try:
        return pq.ParquetFile(path).read().to_pylist()  # read_table would import pandas
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read as parquet ({reason}); remove the file") from None


def read_series(rows: Sequence[LoggedRow], key: str, *, x: str = names.COMPLETIONS) -> tuple[Array, Array]:
    """Returns x and a metric, [n] each, of rows that have both; null (not finite) becomes NaN."""
    pairs = [(row[x], row[key]) for row in rows if key in row and x in row]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # None and "NaN" become NaN
    table[~np.isfinite(table)] = np.nan
    return table[:, 0], table[:, 1]


def _yaml(path: Path) -> dict[str, Any]:
    try:  # a resolved config is plain YAML: libyaml reads it 20 times faster than OmegaConf.load
        plain = yaml.load(path.read_bytes(), yaml.CSafeLoader) if path.exists() else {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML ({reason}); restore or remove it") from None
    if isinstance(plain, dict):
        return {str(key): value for key, value in plain.items()}
    got = f"got {str(plain)[:40]!r}, expected the config of a run"
    raise ConfigError(f"{path}: {got}; restore or remove it")
