"""Exports W&B runs, every row of them, into the record format that figures read.

    python scripts/fetch_wandb.py ENTITY/PROJECT outputs/fetched --group paper_figure_1-tiny

writes outputs/fetched/<group>/<run>/{config.yaml, run.json, metrics.jsonl, eval.jsonl}. The same command
again fetches what is new: runs that had not ended, and runs that have gone on. Runs of the authors' program
are translated by fetch_wandb.yaml, and `--set` adds to config.yaml what figures ask for:

    python scripts/fetch_wandb.py ENTITY/PROJECT outputs/paper --group capo --set algo.name=capo
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from capo_exp.config.errors import ConfigError
from capo_exp.config.places import slug
from capo_exp.config.record import as_data
from capo_exp.runs import metrics as names
from capo_exp.runs.files import write_atomic, write_json
from capo_exp.runs.record import read_record
from capo_exp.runs.wandb_sink import RECORD, has_key

RENAMED: dict[str, list[str]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)

ENDED = {
    "finished": "finished", "failed": "failed",
    "crashed": "interrupted", "killed": "interrupted", "preempted": "interrupted",
}  # fmt: skip
"""W&B's states of runs that log no more -> run.json's; any other state is `running`."""


@dataclass(frozen=True)
class History:
    """The rows of one run, in our keys."""

    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    dropped: dict[str, int]
    """W&B's key -> values that have no place in a record."""


def split(logged: Iterable[Mapping[str, Any]]) -> History:
    """Returns W&B's rows as those of metrics.jsonl and eval.jsonl: an evaluation has eval/accuracy.

    Rows of one step are one row; of a value that was logged again after a resume the last counts. A row that
    does not say how many completions it comes after has those of the training step before.
    """
    dropped: Counter[str] = Counter()
    kept: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for given in logged:
        row = _translated(given, dropped)
        if names.STEP not in row:
            dropped.update(row.keys())
        elif any(not key.startswith("counter/") for key in row):
            place = (names.EVAL_ACCURACY in row, row[names.STEP], row.get("counter/optimizer_step", -1))
            kept[place] = kept.get(place, {}) | row
    rows = [(place[0], kept[place]) for place in sorted(kept)]
    metrics = [row for is_evaluation, row in rows if not is_evaluation and names.COMPLETIONS in row]
    evaluations = [_counted(row, metrics) for is_evaluation, row in rows if is_evaluation]
    return History(metrics, evaluations, dict(dropped))


def _counted(row: dict[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    before = [each[names.COMPLETIONS] for each in metrics if each[names.STEP] <= row[names.STEP]]
    return {names.COMPLETIONS: max(before, default=0), **row}


def _translated(given: Mapping[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    """Returns one row in our keys; a number that is not finite is null, as W&B's NaN stands for."""
    numbers = {key: _number(value) for key, value in given.items() if value is not None}
    row = {key: value for key, value in numbers.items() if names.meaning(key) and value is not ...}
    theirs = {name for choices in RENAMED.values() for name in choices}
    for key, choices in RENAMED.items():
        found = [numbers[name] for name in choices if numbers.get(name, ...) is not ...]
        row |= {key: found[0]} if found and key not in row else {}
    known = {*row, *theirs}
    dropped.update(key for key in numbers if key not in known and not key.startswith("_"))
    return {key: int(value) if key.startswith("counter/") and value else value for key, value in row.items()}


def _number(value: Any) -> Any:
    """Returns a number, None if it is not finite, ... if it is something else, such as a histogram."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ...
    return value if math.isfinite(value) else None


def export(run: Any, output: Path, settings: Sequence[str] = ()) -> str:
    """Writes the record of a W&B run below a folder, unless it is there as it is now.

    Args:
        run: A run of wandb.Api, or an object with its id, path, name, group, state, config, summary_metrics,
            created_at, heartbeat_at, url and scan_history().
        output: The folder that gets <group>/<name>.
        settings: Texts `key=value` that are added to config.yaml.

    Returns:
        A line about the run.

    Raises:
        ConfigError: The folder has a run that was trained here.
    """
    now = {
        "run": "/".join(run.path),
        "state": run.state,
        "heartbeat_at": run.heartbeat_at,
        "set": [*settings],
    }
    folder = _folder(run, output, now["run"])
    before = ((read_record(folder) or {}).get("fetched") or {}).items()
    if run.state in ENDED and now.items() <= before:
        return f"{folder}: there"
    history = split(run.scan_history())
    folder.mkdir(parents=True, exist_ok=True)
    config = OmegaConf.merge(as_data(dict(run.config)), OmegaConf.from_dotlist(as_data(settings)))
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    for name, rows in (("metrics.jsonl", history.metrics), ("eval.jsonl", history.evaluations)):
        write_atomic(folder / name, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    record = _record(run, history) | {"fetched": {**now, "dropped": history.dropped}}
    write_json(folder / "run.json", record)  # last: now it is fetched
    steps = f"{len(history.metrics)} rows, {len(history.evaluations)} evaluations, {run.state}"
    return f"{folder}: {steps}{_about(history.dropped)}"


def _folder(run: Any, output: Path, path: str) -> Path:
    """Returns <group>/<name>, or with the id behind it where another W&B run has that name."""
    group = output / slug(run.group or run.path[1], 200)
    for folder in (group / slug(run.name or run.id, 200), group / slug(f"{run.name}-{run.id}", 200)):
        record = read_record(folder)
        if record is not None and "fetched" not in record:
            raise ConfigError(
                f"{folder} was trained here; expected another folder than {output} for what is fetched"
            )
        if record is None or record["fetched"]["run"] == path:
            break
    return folder


def _record(run: Any, history: History) -> dict[str, Any]:
    summary = run.summary_metrics
    fields = dict(summary.get(RECORD) or {})
    last = history.metrics[-1] if history.metrics else {}
    counters = {key: value for key, value in last.items() if key.startswith("counter/")}
    return {
        "run_id": run.id,
        "started_at": run.created_at,
        "seeds": {"seed": run.config.get("seed")},
        **fields,
        "name": run.name,
        "status": ENDED.get(run.state, "running"),
        "error": None,
        "updated_at": run.heartbeat_at,
        "wall_seconds": (summary.get("_wandb") or {}).get("runtime"),
        "counters": {key.removeprefix("counter/"): value for key, value in counters.items()},
        "tracker": run.url,
    }


def _about(dropped: Mapping[str, int]) -> str:
    if not dropped:
        return ""
    most = ", ".join(sorted(dropped, key=lambda key: -dropped[key])[:3])
    return f"; left out {sum(dropped.values())} values of {len(dropped)} unknown keys ({most})"


def find(project: str, filters: Mapping[str, Sequence[str]]) -> Iterable[Any]:
    """Returns the runs of ENTITY/PROJECT that pass all filters, oldest first.

    Raises:
        ConfigError: No key, or not a project's name.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
        raise ConfigError(f"{project}: expected ENTITY/PROJECT, as in the project's URL")
    if not has_key():
        raise ConfigError("no W&B key: expected WANDB_API_KEY, or `wandb login` once")
    import wandb

    chosen = {key: {"$in": list(values)} for key, values in filters.items() if values}
    return wandb.Api().runs(project, filters=chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; returns the exit status: 1 if a run could not be fetched, 2 if none was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument("--group", nargs="+", default=[], help="only runs of these groups")
    parser.add_argument("--tag", nargs="+", default=[], help="only runs with one of these tags")
    parser.add_argument("--run", nargs="+", default=[], help="only runs with these W&B ids")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="added to each config.yaml")
    given = parser.parse_args(arguments)
    failed = count = 0
    try:
        for run in find(given.project, {"group": given.group, "tags": given.tag, "name": given.run}):
            count += 1
            line, ok = _attempt(run, given.output, given.set)
            failed += not ok
            (sys.stdout if ok else sys.stderr).write(f"{line}\n")
        if not count:
            raise ConfigError(f"{given.project}: no run; expected one that passes all filters")
    except Exception as error:  # of the project: no network, wrong key, no such project
        sys.stderr.write(f"{_line(error)}\n")
        return 2
    sys.stdout.write(f"{count - failed} of {count} runs are in {given.output}\n")
    return 1 if failed else 0


def _attempt(run: Any, output: Path, settings: Sequence[str]) -> tuple[str, bool]:
    try:
        return export(run, output, settings), True
    except Exception as error:  # of one run: the others are fetched all the same
        return f"{run.name} ({run.id}): {_line(error)}", False


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
