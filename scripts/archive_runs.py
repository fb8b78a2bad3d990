"""Copies runs into a folder that is small enough to keep in git, for figures and reports.

    python scripts/archive_runs.py runs=outputs/NAME output=outputs/reference/NAME

Of each run: config.yaml, run.json, eval.jsonl, evaluations/test.jsonl, and metrics.jsonl as metrics.parquet
(every row, every key; a tenth of the bytes). Of the first `samples` runs of each algorithm and regime: the
sampled completions.
"""

import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.errors import ConfigError
from capo_exp.runs.read import LoggedRun, find_runs, list_samples, load_run


@dataclass
class Settings:
    """The command line."""

    runs: str = MISSING  # as python -m capo_exp.figures takes them
    output: Path = MISSING
    samples: int = 1  # runs of each algorithm and regime whose completions are kept


COPIED = ("config.yaml", "run.json", "eval.jsonl", "evaluations/test.jsonl")


def check_links(run: LoggedRun) -> None:
    """Checks that all that is copied of a run is the run's own, and no file elsewhere that it links to.

    Raises:
        ConfigError: It is not.
    """
    folders, metrics = ("evaluations", "completions"), ("metrics.jsonl", "metrics.parquet")
    places = [run.path / name for name in (*folders, *COPIED, *metrics)]
    for place in (*places, *list_samples(run.path).values()):
        if place.is_symlink():
            raise ConfigError(f"{place} is a link, which is not followed; put what it leads to in its place")


def check_targets(runs: Sequence[LoggedRun], output: Path) -> None:
    """Checks that what archive() removes before it writes is neither a run that is read nor another copy.

    Raises:
        ConfigError: It would be.
    """
    targets: dict[Path, LoggedRun] = {}
    for run in runs:
        target = (output / run.name).resolve()
        if target in targets:
            raise ConfigError(f"{targets[target].path} and {run.path} would both be {target}; rename one")
        targets[target] = run
    for run in runs:
        if not targets.keys().isdisjoint((path := run.path.resolve(), *path.parents)):
            raise ConfigError(f"output={output}: {run.path} would be deleted; name another folder")


def archive(run: LoggedRun, folder: Path, *, completions: bool) -> None:
    """Writes one run below `folder`; what is there of an earlier copy goes."""
    target = folder / run.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in COPIED:
        if (run.path / name).is_file():  # and no pipe
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run.path / name, target / name)
    keys = sorted({key for row in run.metrics for key in row})
    numbers = {
        key: [math.nan if row.get(key, 0) is None else row.get(key) for row in run.metrics] for key in keys
    }
    pq.write_table(pa.table(numbers), target / "metrics.parquet", compression="zstd")
    if completions and (samples := list_samples(run.path).values()):
        (target / "completions").mkdir()
        for path in samples:
            shutil.copyfile(path, target / "completions" / path.name)


def main(arguments: list[str]) -> int:
    """Archives what the command line names; returns the exit status."""
    try:
        given = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(arguments))
        settings = OmegaConf.to_object(given)
        assert isinstance(settings, Settings)
        runs = [load_run(os.path.abspath(path)) for path in find_runs(settings.runs.split(","))]
        check_targets(runs, settings.output)
        for run in runs:
            check_links(run)
    except (ConfigError, OmegaConfBaseException) as error:
        sys.stderr.write(f"{str(error).splitlines()[0]}; expected runs=DIR output=DIR [samples=N]\n")
        return 2
    sys.stderr.writelines(f"left out: {text}\n" for run in runs for text in run.left_out)
    seen: Counter[tuple[str, str]] = Counter()
    for run in runs:
        kind = (str(run.setting("algo.name")), str(run.setting("regime.name")))
        seen[kind] += 1
        archive(run, settings.output, completions=seen[kind] <= settings.samples)
    size = sum(path.stat().st_size for path in settings.output.rglob("*") if path.is_file())
    sys.stdout.write(f"{len(runs)} runs, {size / 1e6:.2f} MB, in {settings.output}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
