"""Settings of recorded runs by dotted key: which make another experiment, which make runs incomparable."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from capo_exp.config.architecture import ARCHITECTURE
from capo_exp.config.errors import ConfigError
from capo_exp.runs.identity import list_engine_conditions, read_schema
from capo_exp.runs.read import LoggedRun

Settings = dict[str, Any]
"""Dotted key -> value; lists are values."""

NOT_TRAINING = (
    "evaluation.every", "curvature.calibrate_every", "curvature.calibrate_completions",
    "curvature.calibrate_tokens", "curvature.diagnose_every",
)  # fmt: skip
"""Keys that change how often or how closely a run is measured, not what is measured nor how it
trains: evaluation, calibration and diagnosis draw from random streams of their own (seeds.py). The rest of
`evaluation` is part of what eval/accuracy means."""
LENGTH = ("num_steps", "optimizer.warmup_ratio")
"""Keys that a schedule follows, and nothing else in training."""
NEUTRAL: Settings = {
    "rollout.chunking": "per_step",
    "rollout.train_engine": None,
    "rollout.correction._target_": "capo_exp.algorithms.correction.uncorrected",
    "curvature.hidden_shift": 0,
    "reward.verifier.unparsable_gold": "drop",
}
"""What runs did that are older than a key, beside the defaults of the schema."""
INCOMPARABLE = (
    "model.name", "model.path", "model.revision", "dataset", "reward.name", "reward.verifier._target_",
    "reward.verifier.style", "reward.verifier.function", "reward.verifier.correct_from",
    "rollout.temperature", "rollout.top_k", "rollout.top_p", "evaluation.num_problems",
    "evaluation.samples", "evaluation.temperature", "evaluation.top_p", "data",
)  # fmt: skip
"""Keys, and groups of keys, that say which question the accuracies of a run answer."""
MAX_SHOWN = 4
"""Of keys, and of values of a key, in a message."""


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of a config, without Hydra's `_partial_`."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        elif name != "_partial_":
            yield f"{prefix}{name}", value


def is_within(key: str, groups: Sequence[str]) -> bool:
    """Returns whether a dotted key is one of some keys, or in one of some groups."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def results(run: LoggedRun) -> Settings:
    """Returns the settings that can change a number of the run, its seed too; none without a config.yaml.

    Missing keys are neutral. Problems are known by their fingerprint where it is on record, not by the folder
    they came from; the device by its kind, which the dtype follows.
    """
    if not run.config:
        return {}
    left_out, neutral = read_schema()
    engine = run.setting("rollout.engine")
    if isinstance(engine, dict):
        left_out |= {f"rollout.engine.{name}" for name in list_engine_conditions(engine)}
    known = dict(flat(run.config))
    known |= {key: value for key, value in flat(NEUTRAL | neutral) if key not in known}
    found = {key: value for key, value in known.items() if not is_within(key, tuple(left_out))}
    if "data" in run.record:
        found |= {"dataset.path": None, "data": run.record["data"]}
    device = run.record.get("device") or known.get("device") or "auto"
    return found | {"device": device if device in ("auto", "cpu") else "gpu"}


def training(run: LoggedRun) -> Settings:
    """Returns the settings that two runs of one curve share: `results` without the seed, what the model's
    path implies, the length of a run whose learning rate does not depend on it, and null."""
    found = results(run)
    still = ("seed", *NOT_TRAINING, *(f"model.{name}" for name in ARCHITECTURE))
    if found.get("regime.learning_rate") == 0:
        still += (*LENGTH, "optimizer.schedule")
    elif found.get("optimizer.schedule") == "constant":
        still += LENGTH
    return {key: value for key, value in found.items() if value is not None and not is_within(key, still)}


def varying(table: Sequence[Settings]) -> list[str]:
    """Returns keys whose value is not the same in all, in the order of the first that have them."""
    keys = dict.fromkeys(key for settings in table for key in settings)
    return [key for key in keys if any(settings.get(key) != table[0].get(key) for settings in table)]


def check_comparable(runs: Sequence[LoggedRun]) -> None:
    """Checks that accuracies of the runs answer one question. What a run does not say is not held against it.

    Raises:
        ConfigError: names the keys, their values and how many runs have each.
    """
    table = [question(run) for run in runs]
    counts = {key: Counter(str(each[key]) for each in table if key in each) for key in varying(table)}
    found = {key: count for key, count in counts.items() if len(count) > 1}
    if found:
        shown = "; ".join(f"{key}: {_tally(count)}" for key, count in list(found.items())[:MAX_SHOWN])
        more = f"; and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
        wanted = "expected the same in all: narrow runs=, or mix=true draws them together"
        raise ConfigError(f"runs that cannot be compared differ in {shown}{more}; {wanted}")


def question(run: LoggedRun) -> Settings:
    """Returns the settings that say which question the accuracies of a run answer, as far as it has them."""
    found = {key: value for key, value in results(run).items() if is_within(key, INCOMPARABLE)}
    if found.get("model.path"):
        found["model.path"] = PurePath(found["model.path"]).name  # a hub's id, or wherever a copy lies
    return {key: value for key, value in found.items() if key != "dataset.path"}


def _tally(count: Counter[str]) -> str:
    lines = [f"{shorten(value, 40)} ({number} run{'s' * (number > 1)})" for value, number in count.items()]
    return ", ".join(lines[:MAX_SHOWN]) + (", ..." if len(lines) > MAX_SHOWN else "")


def shorten(text: str, length: int) -> str:
    """Returns one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
