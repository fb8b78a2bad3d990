"""What to evaluate: the keys of the command, and the sets of weights that it names."""

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from capo_exp.config.ranges import (
    AT_LEAST_0,
    AT_LEAST_1,
    NON_NEGATIVE,
    PROJECT,
    TOP_P,
    TRACKER,
    Rule,
    or_null,
)
from capo_exp.config.schema import setting

UNSEEN = "not known whether training had seen the benchmarks"
CHECKPOINT = Rule(lambda v: v in ("last", "all") or v.isdecimal(), "last, all or a step")


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
    checkpoint: str = setting(CHECKPOINT)
    base: bool = MISSING
    samples: int = setting(AT_LEAST_1)
    temperature: float = setting(NON_NEGATIVE)
    top_k: int = setting(AT_LEAST_0)
    top_p: float = setting(TOP_P)
    seed: int = setting(AT_LEAST_0)
    num_problems: int | None = setting(or_null(AT_LEAST_1))
    problems_per_part: int = setting(AT_LEAST_1)
    output: str | None = MISSING
    overwrite: bool = MISSING
    logger: str = setting(TRACKER)
    project: str = setting(PROJECT)
    overrides: list[str] = MISSING
    config_dir: str | None = MISSING
    suites: dict[str, list[str]] = MISSING


def tell(text: str) -> None:
    """Says how far the command is, or what it leaves out, beside the scores."""
    sys.stderr.write(f"{text}\n")
