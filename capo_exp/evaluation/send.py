"""An evaluation in a tracker: its card, its scores and a table of examples, as a run of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo_exp.config.errors import RunFailed, brief
from capo_exp.runs.files import remove
from capo_exp.runs.local_sinks import TensorBoardSink, TrackioSink
from capo_exp.runs.parse import read_rows
from capo_exp.runs.samples import Sample
from capo_exp.runs.trackers import Sink
from capo_exp.runs.wandb_sink import WandbSink, resolve_mode

EXAMPLES = 64
"""Completions of the table, spread over the problems."""
COLUMNS = ("id", "problem", "gold", "completion", "extracted", "correct", "reason")


def send_evaluation(tracker: str, project: str, folder: Path, name: str, scores: Mapping[str, Any]) -> str:
    """Sends what is in the folder of one score, and returns where it can be seen.

    Args:
        tracker: wandb | tensorboard | trackio.
        project: name of the tracker's project.
        folder: with card.json and completions.parquet.
        name: of the tracker's run.
        scores: as in scores.json.

    Raises:
        RunFailed: the tracker does not take them.
    """
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    answers = read_rows(folder / "completions.parquet")
    shown = answers[:: max(1, len(answers) // EXAMPLES)][:EXAMPLES]
    rows = [[" | ".join(row[key]) if key == "gold" else row[key] for key in COLUMNS] for row in shown]
    step = card["model"]["step"] or 0
    try:
        sink = _open(tracker, project, folder, name, card, step)
        sink.log(0, step, dict(_flatten(scores)), Sample(rows, {}, "examples", COLUMNS))
        where = sink.location
        sink.finish(0, ())
        return where
    except Exception as failure:  # whatever a tracker raises, the scores are on disk
        raise RunFailed(f"{tracker} did not take the card of {folder} ({brief(failure)})") from failure


def _open(tracker: str, project: str, folder: Path, name: str, card: dict[str, Any], step: int) -> Sink:
    if tracker == "wandb":
        remove(folder / "wandb")
        about = {"project": project, "name": name, "job_type": "evaluate", "config": card}
        return WandbSink(folder, resolve_mode("auto"), stats=False, table_rows=EXAMPLES, **about)
    if tracker == "tensorboard":
        return TensorBoardSink(folder, "card", json.dumps(card, indent=2, ensure_ascii=False), step)
    return TrackioSink(folder, project, name, "evaluations", card)


def _flatten(node: Mapping[str, Any], prefix: str = "test") -> list[tuple[str, float]]:
    """Returns the numbers of a tree, such as `test/pass_at/2/value`."""
    found: list[tuple[str, float]] = []
    for key, value in node.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{key}", value))
    return found
