"""capo_exp: a research harness for reinforcement learning of language models with curvature-aware token
selection.

From Python: `train`, `evaluate` and `load_runs`, and what a user's own parts need: the types that they take
and return, and the decorators with which they declare something. Importing the package imports
neither torch nor Hydra.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capo_exp.cli.python import Runs as Runs
    from capo_exp.cli.python import evaluate as evaluate
    from capo_exp.cli.python import load_runs as load_runs
    from capo_exp.cli.python import train as train
    from capo_exp.config.declare import compares_group as compares_group
    from capo_exp.config.declare import corrects as corrects
    from capo_exp.config.declare import needs_kl as needs_kl
    from capo_exp.config.declare import needs_reference as needs_reference
    from capo_exp.config.declare import ordered as ordered
    from capo_exp.config.declare import regresses as regresses
    from capo_exp.config.declare import takes_lists as takes_lists
    from capo_exp.config.declare import whole_step as whole_step
    from capo_exp.config.errors import ConfigError as ConfigError
    from capo_exp.core.step import StepDecision as StepDecision
    from capo_exp.core.step import StepTrial as StepTrial
    from capo_exp.core.types import Batch as Batch
    from capo_exp.core.types import BatchTotals as BatchTotals
    from capo_exp.core.types import Completion as Completion
    from capo_exp.core.types import PolicyOutput as PolicyOutput
    from capo_exp.core.types import Problem as Problem
    from capo_exp.core.types import Prompt as Prompt
    from capo_exp.core.types import RolloutGroup as RolloutGroup
    from capo_exp.core.types import Scored as Scored
    from capo_exp.core.types import Selection as Selection
    from capo_exp.core.types import TokenLoss as TokenLoss
    from capo_exp.core.types import TokenLossInput as TokenLossInput
    from capo_exp.core.types import TokenShifts as TokenShifts
    from capo_exp.evaluation.table import BenchmarkScore as BenchmarkScore
    from capo_exp.grading.compare import Grade as Grade
    from capo_exp.grading.verifier import RewardResult as RewardResult
    from capo_exp.grading.verifier import Verifier as Verifier
    from capo_exp.rollout import RolloutEngine as RolloutEngine
    from capo_exp.rollout import SamplingRequest as SamplingRequest
    from capo_exp.runs.read import LoggedRun as LoggedRun

    __version__: str

_PUBLIC = {
    "cli.python": ("Runs", "evaluate", "load_runs", "train"),
    "config.declare": (
        "compares_group", "corrects", "needs_kl", "needs_reference", "ordered", "regresses", "takes_lists",
        "whole_step",
    ),
    "config.errors": ("ConfigError",),
    "core.types": (
        "Batch", "BatchTotals", "Completion", "PolicyOutput", "Problem", "Prompt", "RolloutGroup",
        "Scored", "Selection", "TokenLoss", "TokenLossInput", "TokenShifts",
    ),
    "core.step": ("StepDecision", "StepTrial"),
    "evaluation.table": ("BenchmarkScore",),
    "grading.compare": ("Grade",),
    "grading.verifier": ("RewardResult", "Verifier"),
    "rollout": ("RolloutEngine", "SamplingRequest"),
    "runs.read": ("LoggedRun",),
}  # fmt: skip
"""Module -> names that the package exports; each is imported when it is first asked for."""
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_MODULES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("capo_exp")
    if name not in _MODULES:
        raise AttributeError(f"module capo_exp has no attribute {name!r}")
    return getattr(import_module(f"capo_exp.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
