"""From runs to curves: which runs are seeds of one another, and what each curve is called."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from capo_exp.config.errors import ConfigError
from capo_exp.figures import labels
from capo_exp.figures.bands import in_evaluations
from capo_exp.runs import metrics as names
from capo_exp.runs import settings
from capo_exp.runs.read import LoggedRun, read_series

START_STEP = 10
"""Rollout step of runs with learning rate 0 that accuracy curves start from, as in the paper's figures."""
FIRST = ("CAPO", "Dr. CAPO", "ReinCAPO", "GRPO", "Dr. GRPO", "REINFORCE")
"""The paper's methods, which are drawn before all others and in this order."""
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass(frozen=True)
class Curve:
    """Runs that differ from each other in nothing that matters but their seed."""

    label: str  # For people, such as `CAPO (A)` or `GRPO (A) lr 5e-4`; unique among the curves of one figure
    runs: tuple[LoggedRun, ...]  # In the order of their seeds

    @property
    def run(self) -> LoggedRun:
        """Returns the first run, whose settings are those of all."""
        return self.runs[0]


def curves(runs: Sequence[LoggedRun], *, mix: bool) -> list[Curve]:
    """Groups runs by all that changes how they train or what is measured, but the seed (settings.training).

    A copy of a run (the same run id, device and commit) counts once. Runs without a config.yaml are curves
    of their own. `mix` draws runs together that cannot be compared.

    Raises:
        ConfigError: mix=False and runs differ in model, problems, reward or sampling; or two different runs
            have the same seed and settings.
    """
    if not mix:
        settings.check_comparable(runs)
    groups: dict[str, list[LoggedRun]] = defaultdict(list)
    for run in without_copies(runs):
        groups[_identity(run)].append(run)
    members = [_seeds(group) for group in groups.values()]
    table = [settings.training(group[0]) for group in members]
    named = labels.unique_labels(table, [labels.base_label(group[0]) for group in members])
    return sorted(
        (Curve(label, tuple(group)) for label, group in zip(named, members, strict=True)), key=order
    )


def families(runs: Sequence[LoggedRun]) -> list[list[LoggedRun]]:
    """Returns the runs in groups that can be compared, each where its first run is."""
    found: list[tuple[settings.Settings, list[LoggedRun]]] = []  # What all of a family say of their question
    for run in runs:
        own = settings.question(run)
        for known, family in found:
            if all(str(known.get(key, value)) == str(value) for key, value in own.items()):
                known |= own
                family.append(run)
                break
        else:
            found.append((own, [run]))
    return [family for _, family in found]


def without_copies(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """Keeps, of runs with one run id, device and commit, the one that has come furthest: the others have the
    same numbers."""
    furthest: dict[tuple[Any, ...], LoggedRun] = {}
    for run in sorted(runs, key=lambda run: (len(run.metrics), len(run.evaluations))):
        device, commit = settings.results(run).get("device"), (run.record.get("git") or {}).get("commit")
        furthest[run.record.get("run_id") or run.path, device, commit] = run
    return list(furthest.values())


def _identity(run: LoggedRun) -> str:
    if not run.config:
        return str(run.path)
    plain = {key: _as_float(value) for key, value in settings.training(run).items()}
    return json.dumps(plain, sort_keys=True, default=str)


def _as_float(value: Any) -> Any:  # a config that has been through JavaScript has 1 for 1.0
    if isinstance(value, list):
        return [_as_float(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _seeds(group: Sequence[LoggedRun]) -> list[LoggedRun]:
    """Returns the runs in the order of their seeds; two of one seed would make no mean over seeds."""
    ordered = sorted(group, key=lambda run: run.setting("seed", -1))
    for seed, same in groupby(ordered, lambda run: run.setting("seed")):
        where = [str(run.path) for run in same]
        if len(where) > 1:
            got = f"{', '.join(where)}: different runs with the same settings and seed {seed}"
            raise ConfigError(f"{got}; expected one run for each seed, narrow runs=")
    return ordered


def order(curve: Curve) -> tuple[int, list[tuple[float, str]]]:
    """Returns the place of the method, then the label, with numbers in it as numbers."""
    name = labels.algorithm(curve.run)
    pieces = enumerate(NUMBER.split(curve.label))
    parts = [(float(piece), "") if i % 2 else (-math.inf, piece) for i, piece in pieces]
    return FIRST.index(name) if name in FIRST else len(FIRST), parts


def reference_of(curves: Sequence[Curve]) -> Curve | None:
    """Returns the curve of plain GRPO in the conservative regime; the one with most seeds if several are."""
    plain = [curve for curve in curves if labels.is_safe(curve.run) and labels.method(curve.run) == "GRPO"]
    return max(plain, key=lambda curve: len(curve.runs), default=None)


def start_value(runs: Sequence[LoggedRun], key: str) -> float | None:
    """Returns a metric before training, mean over seeds; None if the runs cannot say.

    Of an evaluation that is its value at x = 0 in all runs; of a training metric its value at step
    START_STEP, or the last before it, of runs with learning rate 0, as a run's first step trains already.
    """
    if in_evaluations(key):
        points = [read_series(run.evaluations, key) for run in runs]
        found = [value for x, y in points for value in y[x == 0]]
    else:
        still = [run for run in runs if run.config and run.setting("regime.learning_rate") == 0]
        points = [read_series(run.metrics, key, x=names.STEP) for run in still]
        found = [value for x, y in points for value in y[x <= START_STEP][-1:]]
    return float(np.nanmean(found)) if np.isfinite(found).any() else None
