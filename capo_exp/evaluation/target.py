"""What is evaluated: a set of weights."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING


@dataclass(frozen=True)
class Target:
    """One set of weights."""

    label: str
    """Such as step_000100, or the model's name."""
    weights: Path | None
    """A checkpoint; None = those of model.path."""
    step: int | None
    """Of the checkpoint; 0 = the model that a run began with; None = no run."""
    completions: float | None
    """That training had sampled by then."""
    root: Path
    """Folder of its evaluations."""


@dataclass(frozen=True)
class Command:
    """What conf/evaluate.yaml has, with what the command line says."""

    run: list[str] = field(default_factory=list)
    model: str | None = MISSING
    completions: str | None = MISSING
    benchmarks: list[str] = field(default_factory=list)
    checkpoint: str = MISSING
    base: bool = MISSING
    samples: int = MISSING
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    seed: int = MISSING
    num_problems: int | None = MISSING
    problems_per_part: int = MISSING
    output: str | None = MISSING
    overwrite: bool = MISSING
    suites: dict[str, list[str]] = field(default_factory=dict)
