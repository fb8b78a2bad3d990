"""What to evaluate: the keys of the command, and the sets of weights that it names."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from capo_exp.config.ranges import AT_LEAST_0, AT_LEAST_1, NON_NEGATIVE, PROJECT, TRACKER, Rule

CHECKPOINT = Rule(lambda v: v in ("last", "all") or v.isdecimal(), "last, all or a step")
SHARE_ABOVE_0 = Rule(lambda v: 0 < v <= 1, "a number above 0 up to 1")


def _ranged(rule: Rule) -> Any:
    return field(default=MISSING, metadata={"range": rule})


@dataclass(frozen=True)
class WeightSet:
    """One set of weights to be evaluated."""

    label: str  # Such as step_000100, or the model's name
    weights: Path | None  # A checkpoint; None = those of model.path
    step: int | None  # Rollout step of the checkpoint; 0 = the model that a run began with; None = no run
    completions: float | None  # Completions that training had sampled by then
    root: Path  # The folder of its evaluations


@dataclass(frozen=True)
class EvaluateCommand:
    """The keys of conf/evaluate.yaml, which says what each one means."""

    run: list[str] = MISSING
    model: str | None = MISSING
    completions: str | None = MISSING
    benchmarks: list[str] = MISSING
    checkpoint: str = _ranged(CHECKPOINT)
    base: bool = MISSING
    samples: int = _ranged(AT_LEAST_1)
    temperature: float = _ranged(NON_NEGATIVE)
    top_k: int = _ranged(AT_LEAST_0)
    top_p: float = _ranged(SHARE_ABOVE_0)
    seed: int = _ranged(AT_LEAST_0)
    num_problems: int | None = _ranged(AT_LEAST_1)
    problems_per_part: int = _ranged(AT_LEAST_1)
    output: str | None = MISSING
    overwrite: bool = MISSING
    logger: str = _ranged(TRACKER)
    project: str = _ranged(PROJECT)
    overrides: list[str] = MISSING
    config_dir: str | None = MISSING
    suites: dict[str, list[str]] = MISSING


def tell(text: str) -> None:
    """Says how far the command is, or what it leaves out, beside the scores."""
    sys.stderr.write(f"{text}\n")
