"""What a tracker shows of the completions that a run has kept, read from its files. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capo_exp.runs import metrics as names
from capo_exp.runs.parse import is_parquet
from capo_exp.runs.read import Array, LoggedRow, read_archived, read_completions, read_jsonl

COLUMNS = ("prompt", "completion", "answer", "reward", "advantage", "truncated", "rejected")
"""Of a tracker's table; the last says how many tokens were rejected."""


@dataclass(frozen=True)
class Sample:
    """A table of completions: those that were kept at a step, or the examples of an evaluation."""

    rows: list[list[Any]]
    """Each with `columns`; rejected tokens stand between [- and -] in the completion."""
    histograms: dict[str, Array]
    """Finite values of all their tokens (advantages: of all completions); empty where none are due."""
    name: str = "completions"
    columns: tuple[str, ...] = COLUMNS


def read_logged(run_dir: Path) -> list[LoggedRow]:
    """Returns the rows of both files as they were logged: an evaluation after the training step before it."""
    metrics = read_jsonl(run_dir / "metrics.jsonl") or read_archived(run_dir / "metrics.parquet")
    rows = [*metrics, *read_jsonl(run_dir / "eval.jsonl")]
    return sorted(rows, key=lambda row: row[names.STEP])  # which keeps the order within a step


def read_sample(run_dir: Path, step: int, *, histograms: bool) -> Sample | None:
    """Returns the completions kept at a step, and what their tokens were worth; None where there are none."""
    path = run_dir / "completions" / f"step_{step:06d}.parquet"
    kept = read_completions(path) if is_parquet(path) else []
    if not kept:
        return None
    shown = [
        {**row, "completion": mark_rejected(row), "rejected": list(row.get("keep") or []).count(False)}
        for row in kept
    ]
    rows = [[row.get(key) for key in COLUMNS] for row in shown]
    return Sample(rows, gather_values(kept) if histograms else {})


def mark_rejected(row: Mapping[str, Any]) -> str:
    """Returns a completion with each run of rejected tokens between [- and -], as wdiff marks deletions."""
    if not row.get("tokens") or not row.get("keep"):
        return str(row.get("completion") or "")
    pairs = zip(row["tokens"], row["keep"], strict=True)
    text = "".join((t or "") if kept is None or kept else f"[-{t or ''}-]" for t, kept in pairs)
    return text.replace("-][-", "")


def gather_values(kept: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Returns what histograms are made of. Shifts are decimal logarithms, for they differ by many orders of
    magnitude; m_H is split by its sign, and what is exactly 0 is left out."""

    def gather(key: str) -> Array:
        return np.array([x for row in kept for x in row.get(key) or []], dtype=np.float64)

    def logarithm(values: Array) -> Array:
        return np.log10(values[np.isfinite(values) & (values > 0)])

    objective = gather("objective_shift")
    advantage = np.array([row.get("advantage") for row in kept], dtype=np.float64)
    found = {
        "policy_shift_log10": logarithm(gather("policy_shift")),
        "objective_gain_log10": logarithm(objective),
        "objective_loss_log10": logarithm(-objective),
        "advantage": advantage[np.isfinite(advantage)],
    }
    return {f"histogram/{key}": values for key, values in found.items() if values.size}
