"""Reads what a run left on disk. Runs may be short, unfinished, damaged, or older than a metric. No torch.

A damaged file or line hides nothing else: a LoggedRun is what can be read, and says what it left out.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.parse import LoggedRow, check_row, is_parquet, read_rows, read_yaml, scan_jsonl
from capo_exp.runs.record import read_record, run_status

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

MARKS = {"run.json", "metrics.jsonl", "metrics.parquet"}
"""A folder with one of these files is a run directory."""

RECORD_TYPES = {
    "status": str, "run_id": str, "name": str, "error": str | None, "wall_seconds": int | float,
    "counters": dict, "git": dict | None, "wandb": str | None, "tracker": str | None,
}  # fmt: skip
"""What is relied on of run.json; other values count as missing."""

LARGEST = 1e100
"""What is beyond is drawn as what is not finite: an axis of 1e308 has no ticks."""

SETTING_TYPES = {
    "num_steps": int, "seed": int, "regime.prompts_per_step": int, "regime.group_size": int,
    "regime.learning_rate": int | float, "algo.kl_coefficient": int | float, "algo.selection": dict,
    "algo.num_iterations": int, "algo.selection.policy_shift_max": int | float,
    "algo.selection.objective_shift_min": int | float, "algo.selection.objective_shift_max": int | float,
    "reward.verifier.correct_from": int | float,
}  # fmt: skip
"""What is relied on of config.yaml; one with other values is damaged."""

COMPLETION_KINDS = {
    "reward": "number", "advantage": "number", "tokens": "list of text",
    **dict.fromkeys(("token_ids", "log_prob", "policy_shift", "objective_shift", "keep"), "list of number"),
}  # fmt: skip
"""Columns of completions/ that are computed with."""

MOST_STEPS = 1_000_000
"""What is more in a config is no number of steps that could be drawn."""

RECENT = 10
"""Steps that a run's last training accuracy is the mean of."""

EXPECTED = "expected a directory with runs, such as outputs, or a run's own, with run.json or metrics.jsonl"


@dataclass(frozen=True)
class LoggedRun:
    """One run directory in memory."""

    path: Path
    config: dict[str, Any]
    """config.yaml; empty if missing or damaged."""
    record: dict[str, Any]
    """run.json; empty if missing or damaged."""
    metrics: list[LoggedRow]
    """metrics.jsonl, one row an optimiser step; empty before the first."""
    evaluations: list[LoggedRow]
    """eval.jsonl, one row an evaluation of training; then evaluations/test.jsonl, one row a checkpoint that
    `python -m capo_exp.evaluate` has tested, by the cards that it used last."""
    left_out: tuple[str, ...] = ()
    """What of its files could not be read, a sentence each."""

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
    def steps(self) -> list[LoggedRow]:
        """The last row of each rollout step."""
        return list({row[names.STEP]: row for row in self.metrics if names.STEP in row}.values())

    @property
    def state(self) -> str:
        """What it is now: absent (no run.json) | running | finished | failed | interrupted | unreadable."""
        return run_status(self.path)


def find_runs(patterns: Sequence[str | Path]) -> list[Path]:
    """Returns run directories, each once, in order of their paths.

    A pattern is a run directory, a file in it, a folder with runs at any depth, or a glob of these. Hidden
    folders, and what is inside a run directory, are not searched.

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
        folders[:] = [] if is_run or real in seen else sorted(name for name in folders if name[0] != ".")
        seen.add(real)
        if is_run:
            yield Path(folder)


def load_run(run_dir: Path | str) -> LoggedRun:
    """Reads a run directory as far as it is.

    Raises:
        FileNotFoundError: There is neither a metrics.jsonl nor a run.json.
    """
    path = Path(run_dir)
    if not path.is_dir() or MARKS.isdisjoint(os.listdir(path)):
        raise FileNotFoundError(f"{path} has no metrics.jsonl; expected the directory of one run")
    left_out: list[str] = []

    def rows(name: str) -> list[LoggedRow]:
        found, damaged = scan_jsonl(path / name)
        left_out.extend(damaged)
        return found

    config = _or_empty(lambda: read_yaml(path / "config.yaml"), left_out)
    record = _or_empty(lambda: read_record(path) or {}, left_out)
    wrong = [key for key, kind in RECORD_TYPES.items() if key in record and not isinstance(record[key], kind)]
    left_out += [f"{path}/run.json: {key} is {json.dumps(record.pop(key))[:40]}" for key in wrong]
    metrics = rows("metrics.jsonl") or _or_empty(lambda: read_archived(path / "metrics.parquet"), left_out)
    left_out += _lost(path, record, metrics or [])
    tests = rows("evaluations/test.jsonl")  # those of the benchmarks tested last; others are other questions
    tests = [row for row in tests if row.get("cards") == tests[-1].get("cards")]
    evaluations = [*rows("eval.jsonl"), *tests]
    broken = sorted(set(find_samples(path).values()) - set(list_samples(path).values()))
    left_out += [f"{sample} is not a parquet file" for sample in broken]
    run = LoggedRun(path, config, record, metrics or [], evaluations)
    found = {key: run.setting(key) for key in SETTING_TYPES}
    strange = [key for key, kind in SETTING_TYPES.items() if not isinstance(found[key], kind | None)]
    told = {key: json.dumps(found[key], default=str)[:40] for key in strange}
    left_out += [f"{path}/config.yaml: {key} is {value}" for key, value in told.items()]
    return replace(run, config={} if strange else config, left_out=tuple(left_out))


def _lost(path: Path, record: dict[str, Any], metrics: Sequence[LoggedRow]) -> list[str]:
    """Says which steps a run has counted and has no row of."""
    counted = record.get("counters", {}).get("rollout_step")
    if record.get("status") != "finished" or not isinstance(counted, int) or counted > MOST_STEPS:
        return []
    gone = sorted({*range(1, counted + 1)} - {row.get(names.STEP) for row in metrics})
    of = f"{gone[0]} to {gone[-1]}" if len(gone) > 1 else "".join(map(str, gone))
    return [f"{path}/metrics.jsonl: {len(gone)} of {counted} steps have no row, of {of}"] if gone else []


def _or_empty(read: Callable[[], Any], left_out: list[str]) -> Any:
    try:
        return read()
    except ConfigError as error:
        left_out.append(str(error).split(";")[0])
        return {}


def to_its_end(run: LoggedRun) -> LoggedRun:
    """Returns a run that ended for want of reward (stop_after_unrewarded) with the steps that it left out.

    They have a reward and an accuracy of 0, and counters that go on; its last evaluation and its last test
    stand at the end, too. Other runs stay as they are.
    """
    left_out = _left_out(run)
    if not left_out:
        return run
    kinds = [[row for row in run.evaluations if key in row] for key in (names.EVAL_ACCURACY, "test/accuracy")]
    last = [{**rows[-1], **left_out[-1]} for rows in kinds if rows]
    return replace(run, metrics=[*run.metrics, *left_out], evaluations=[*run.evaluations, *last])


def _left_out(run: LoggedRun) -> list[LoggedRow]:
    if run.record.get("status") != "finished" or not run.metrics:
        return []
    last = run.metrics[-1]
    counted = last.keys() >= {names.STEP, names.COMPLETIONS} and last.get(names.UNREWARDED_STEPS)
    planned = [run.setting(key) for key in ("num_steps", "regime.prompts_per_step", "regime.group_size")]
    if not counted or not all(type(count) is int and 0 < count <= MOST_STEPS for count in planned):
        return []
    step, completions = int(last[names.STEP]), last[names.COMPLETIONS]
    num_steps, batch = planned[0], planned[1] * planned[2]
    batch *= last.get("rollout/sampling_rounds") or 1  # as often as it sampled in vain
    zero = {names.TRAIN_ACCURACY: 0.0, names.TRAIN_REWARD: 0.0}
    further = ("counter/optimizer_step", "counter/prompts", names.GENERATED_TOKENS)
    rates = {key: last[key] / max(step, 1) for key in further if key in last}  # the run's own
    return [
        {names.STEP: at, names.COMPLETIONS: completions + (at - step) * batch, **zero}
        | {key: last[key] + (at - step) * rate for key, rate in rates.items()}
        for at in range(step + 1, num_steps + 1)
    ]


def read_jsonl(path: Path) -> list[LoggedRow]:
    """Returns the rows of a .jsonl file: none if it is missing, without a last line that a kill cut short.

    Raises:
        ConfigError: Another line is not a row.
    """
    rows, damaged = scan_jsonl(path)
    if damaged:
        raise ConfigError(f"{damaged[0]}; remove the line, or the run")
    return rows


def load_completions(run: LoggedRun, step: int | None = None) -> list[LoggedRow]:
    """Returns sampled completions of a step, or all in the order of their steps, each with its `step`.

    A damaged file or completion is left out with a warning; older runs lack some columns.
    """
    found: list[LoggedRow] = []
    for number, path in sorted(list_samples(run.path).items()):
        if step in (None, number):
            try:
                found += [{**row, "step": number} for row in read_completions(path)]
            except ConfigError as error:
                log.warning("left out: %s", error)
    return found


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Returns the completions of a file; those whose lists differ in length are left out with a warning.

    Raises:
        ConfigError: It cannot be read.
    """
    lists = [key for key, kind in COMPLETION_KINDS.items() if kind.startswith("list")]
    rows = read_rows(path, COMPLETION_KINDS)
    whole = [row for row in rows if len({len(row[key]) for key in lists if row.get(key)}) < 2]
    if len(whole) < len(rows):
        log.warning("left out: %s: %d completions, lists of unequal length", path, len(rows) - len(whole))
    return whole


def list_samples(run_dir: Path) -> dict[int, Path]:
    """Returns step -> file of sampled completions, without what is no parquet file from end to end."""
    return {step: path for step, path in find_samples(run_dir).items() if is_parquet(path)}


def find_samples(run_dir: Path) -> dict[int, Path]:
    """Returns step -> file of sampled completions, whole or not."""
    found: dict[int, Path] = {}
    with suppress(OSError):
        for name in os.listdir(run_dir / "completions"):
            if match := re.fullmatch(r"step_([0-9]+)\.parquet", name):
                found[int(match[1])] = run_dir / "completions" / name
    return found


def read_archived(path: Path) -> list[LoggedRow]:
    """Returns rows from what scripts/archive_runs.py made of them: no value is no key, NaN is null."""
    rows = read_rows(path) if os.path.exists(path) else []
    known = [{key: value for key, value in row.items() if value is not None} for row in rows]
    try:
        for row in known:
            check_row(row)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return [{key: None if value != value else value for key, value in row.items()} for row in known]


def values(rows: Sequence[LoggedRow], key: str) -> list[float]:
    """Returns a metric where it is there and finite."""
    return [value for row in rows if (value := row.get(key)) is not None]


def read_series(rows: Sequence[LoggedRow], key: str, *, x: str = names.COMPLETIONS) -> tuple[Array, Array]:
    """Returns x and a metric, [n] each, of rows that have both; null (not finite) becomes NaN."""
    pairs = [(row[x], row[key]) for row in rows if key in row and x in row]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # None and "NaN" become NaN
    table[~(np.abs(table) < LARGEST)] = np.nan
    return table[:, 0], table[:, 1]
