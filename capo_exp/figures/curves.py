"""From runs to curves: which runs are seeds of one another, what each curve is called, and which runs cannot
be compared."""

import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capo_exp.config.errors import ConfigError
from capo_exp.figures import labels, settings, style
from capo_exp.figures.bands import Source
from capo_exp.figures.intervals import ema
from capo_exp.runs import metrics as names
from capo_exp.runs.read import LoggedRun, read_series

START_STEP = 10
"""Rollout step of runs with learning rate 0 that accuracy curves start from, as in the paper's figures."""

NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass(frozen=True)
class Curve:
    """Runs that differ from each other in nothing that matters but their seed."""

    label: str
    """For people, such as `CAPO (A)` or `GRPO (A) lr 5e-4`; unique among the curves of one figure."""
    algorithm: str
    """algo.name; the key of style.ALGORITHM_COLOURS. Empty if config.yaml is missing."""
    regime: str
    """regime.name; empty if config.yaml is missing."""
    runs: tuple[LoggedRun, ...]
    """In the order of their seeds."""


def curves(runs: Sequence[LoggedRun], *, mix: bool) -> list[Curve]:
    """Groups runs by all that changes how they train or what is measured, but the seed (settings.training).

    A copy of a run (the same run id) counts once. Runs without a config.yaml are curves of their own.

    Args:
        runs: Of one figure.
        mix: Draws runs together that cannot be compared.

    Returns:
        Curves in the order of style.ALGORITHM_COLOURS, each with a label of its own.

    Raises:
        ConfigError: mix=False and runs differ in model, problems, reward or sampling; or two different runs
            have the same seed and settings.
    """
    if not mix:
        settings.check_comparable(runs)
    groups: dict[str, list[LoggedRun]] = defaultdict(list)
    for run in _without_copies(runs):
        groups[_identity(run)].append(run)
    members = [_seeds(group) for group in groups.values()]
    table = [settings.training(group[0]) for group in members]
    bases = [labels.base_label(each, group[0].name) for each, group in zip(table, members, strict=True)]
    named = labels.unique_labels(table, bases)
    return sorted(map(_curve, named, members), key=_order)


def _without_copies(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """Of runs with one run id, which all ask for the same numbers, the one that has come furthest."""
    furthest: dict[str, LoggedRun] = {}
    for run in sorted(runs, key=lambda run: (len(run.metrics), len(run.evaluations))):
        furthest[run.record.get("run_id") or str(run.path)] = run
    return list(furthest.values())


def _identity(run: LoggedRun) -> str:
    if not run.config:
        return str(run.path)
    plain = {key: _as_float(value) for key, value in settings.training(run).items()}
    return json.dumps(plain, sort_keys=True, default=str)


def _as_float(value: Any) -> Any:
    """Whole numbers as floats: a config that has been through JavaScript has 1 for 1.0."""
    if isinstance(value, list):
        return [_as_float(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _seeds(group: Sequence[LoggedRun]) -> list[LoggedRun]:
    """The runs in the order of their seeds.

    Raises:
        ConfigError: two have the same, so that their mean would not be one over seeds.
    """
    of_seed: dict[Any, list[LoggedRun]] = defaultdict(list)
    for run in group:
        of_seed[run.setting("seed")].append(run)
    for seed, same in of_seed.items():
        if len(same) > 1:
            where = ", ".join(str(run.path) for run in same)
            expected = "expected one run for each seed, narrow runs="
            raise ConfigError(f"{where}: different runs with the same settings and seed {seed}; {expected}")
    return [of_seed[seed][0] for seed in sorted(of_seed, key=lambda seed: -1 if seed is None else seed)]


def _curve(label: str, group: Sequence[LoggedRun]) -> Curve:
    algorithm, regime = (str(group[0].setting(f"{name}.name", "")) for name in ("algo", "regime"))
    return Curve(label=label, algorithm=algorithm, regime=regime, runs=tuple(group))


def _order(curve: Curve) -> tuple[int, list[tuple[float, str]]]:
    """Place of the algorithm's colour, then the label, with numbers in it as numbers."""
    colours = list(style.ALGORITHM_COLOURS)
    place = colours.index(curve.algorithm) if curve.algorithm in colours else len(colours)
    pieces = NUMBER.split(curve.label)
    return place, [(float(piece), "") if i % 2 else (-math.inf, piece) for i, piece in enumerate(pieces)]


def differences(runs: Sequence[LoggedRun]) -> dict[str, list[Any]]:
    """Dotted config keys that are not the same in all runs, with the value of each; None where it has none.

    The seed is one of them, and so is how often a run is measured; keys that change no number of a run
    (runs.identity) and the folder of the problems are not.
    """
    table = [settings.results(run) for run in runs]
    return {
        key: [each.get(key) for each in table] for key in settings.varying(table) if key != "dataset.path"
    }


def reference_of(curves: Sequence[Curve], key: str = "grpo", regime: str = "conservative") -> Curve | None:
    """The curve of an algorithm (algo.name) in a regime, with nothing on top of it (algo.variant,
    algo.step_rule_name); the one with most seeds if there are several."""
    found = [curve for curve in curves if (curve.algorithm, curve.regime) == (key, regime)]
    on_top = ("algo.variant", "algo.step_rule_name")
    plain = [curve for curve in found if not any(map(curve.runs[0].setting, on_top))]
    return max(plain, key=lambda curve: len(curve.runs), default=None)


def start_value(
    runs: Sequence[LoggedRun], key: str, *, source: Source = "metrics", alpha: float = 1.0
) -> float | None:
    """A metric before training, mean over seeds; None if the runs cannot say.

    Args:
        runs: Of one figure.
        key: Metric.
        source: eval = the evaluations at x = 0 of all runs; metrics = step START_STEP, or the last before it,
            of runs with learning rate 0: before its first step a run has no training accuracy.
        alpha: Smoothing along the steps, as of the other curves; does nothing for evaluations.
    """
    if source == "eval":
        points = [read_series(run.evaluations, key) for run in runs]
        found = [value for x, y in points for value in y[x == 0]]
    else:
        still = [run for run in runs if run.config and run.setting("regime.learning_rate") == 0]
        points = [read_series(run.metrics, key, x=names.STEP) for run in still]
        found = [value for x, y in points for value in ema(y, alpha)[x <= START_STEP][-1:]]
    finite = [value for value in found if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def check_key(runs: Sequence[LoggedRun], key: str) -> None:
    """Checks that a metric is in metrics.jsonl or eval.jsonl of some run.

    Raises:
        ConfigError: It is in none; names the nearest.
    """
    present = {name for run in runs for row in (*run.metrics, *run.evaluations) for name in row}
    if key in present:
        return
    known = {**names.METRICS, **dict.fromkeys(present)}
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    if key in names.METRICS:
        reason = "none of these runs logged it"
    else:
        reason = f"no such metric; nearest: {', '.join(near)}" if near else "no such metric"
    raise ConfigError(f"{key}: {reason}; the metrics are those in capo_exp/runs/metrics.py")
