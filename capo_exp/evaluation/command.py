"""What to evaluate: the keys of the command, and the sets of weights that it names."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING


@dataclass(frozen=True)
class WeightSet:
    """One set of weights to be evaluated."""

    label: str
    """Such as step_000100, or the model's name."""
    weights: Path | None
    """A checkpoint; None = those of model.path."""
    step: int | None
    """Rollout step of the checkpoint; 0 = the model that a run began with; None = no run."""
    completions: float | None
    """Completions that training had sampled by then."""
    root: Path
    """The folder of its evaluations."""


@dataclass(frozen=True)
class EvaluateCommand:
    """The keys of conf/evaluate.yaml, which says what each one means."""

    run: list[str] = MISSING
    model: str | None = MISSING
    completions: str | None = MISSING
    benchmarks: list[str] = MISSING
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
    overrides: list[str] = MISSING
    config_dir: str | None = MISSING
    suites: dict[str, list[str]] = MISSING
