"""Reads what a run left on disk. Runs may be short, unfinished, or older than a metric."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from capo_exp import metric_names as names

Row = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One run directory in memory."""

    path: Path
    config: dict[str, Any]
    """config.yaml; empty if missing."""
    record: dict[str, Any]
    """run.json; empty if missing."""
    metrics: list[Row]
    """metrics.jsonl, one row a rollout step."""
    evaluations: list[Row]
    """eval.jsonl, one row an evaluation."""

    def setting(self, key: str, default: Any = None) -> Any:
        """A config value by its dotted key, such as `algo.selection.policy_shift_max`."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def load_run(run_dir: Path | str) -> Run:
    """Reads a run directory.

    Raises:
        FileNotFoundError: There is no metrics.jsonl.
    """
    path = Path(run_dir)
    if not (path / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{path} has no metrics.jsonl; expected the directory of one run")
    return Run(
        path=path,
        config=_yaml(path / "config.yaml"),
        record=_json(path / "run.json"),
        metrics=read_jsonl(path / "metrics.jsonl"),
        evaluations=read_jsonl(path / "eval.jsonl"),
    )


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a .jsonl file; a missing file has none, a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def series(rows: Sequence[Row], key: str, *, x: str = names.COMPLETIONS) -> tuple[Array, Array]:
    """Values of x and of a metric, [n] each, where both are there; null (not finite) becomes NaN."""
    pairs = [(row[x], row[key]) for row in rows if key in row and x in row]
    table = np.array([[_number(a), _number(b)] for a, b in pairs], dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _yaml(path: Path) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
