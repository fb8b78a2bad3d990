"""An evaluation in a tracker: its card, its scores and a table of examples, as a run of its own."""

import io
import json
import shlex
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_exp.config.errors import RunFailed
from capo_exp.runs.files import remove
from capo_exp.runs.local_sinks import markdown_table
from capo_exp.runs.parse import read_parquet
from capo_exp.runs.wandb_sink import quiet_settings, resolve_mode

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
    answers = read_parquet(folder / "completions.parquet")
    shown = answers[:: max(1, len(answers) // EXAMPLES)][:EXAMPLES]
    rows = [[" | ".join(row[key]) if key == "gold" else row[key] for key in COLUMNS] for row in shown]
    step = card["model"]["step"] or 0
    try:
        return SENDERS[tracker](_Evaluation(project, folder, name, card, dict(_flatten(scores)), rows, step))
    except Exception as failure:  # whatever a tracker raises, the scores are on disk
        said = " ".join(str(failure).split())[:160] or type(failure).__name__
        raise RunFailed(f"{tracker} did not take the card of {folder} ({said})") from failure


@dataclass(frozen=True)
class _Evaluation:
    project: str
    folder: Path
    name: str
    card: dict[str, Any]
    numbers: dict[str, float]
    examples: list[list[Any]]
    step: int


def _flatten(node: Mapping[str, Any], prefix: str = "test") -> list[tuple[str, float]]:
    """Returns the numbers of a tree, such as `test/pass_at/2/value`."""
    found: list[tuple[str, float]] = []
    for key, value in node.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{key}", value))
    return found


def _to_wandb(what: _Evaluation) -> str:
    import wandb

    mode: Any = resolve_mode("auto")
    remove(what.folder / "wandb")
    run = wandb.init(
        project=what.project, name=what.name, job_type="evaluate", config=what.card, dir=what.folder,
        mode=mode, reinit="create_new", settings=quiet_settings(stats=False),
    )  # fmt: skip
    rows: Any = what.examples
    run.log(what.numbers | {"examples": wandb.Table(list(COLUMNS), rows, allow_mixed_types=True)})
    where = run.url or f"wandb sync {shlex.quote(str(what.folder / 'wandb'))}/offline-run-*"
    run.finish()
    return where


def _to_tensorboard(what: _Evaluation) -> str:
    from torch.utils.tensorboard import SummaryWriter

    remove(what.folder / "tensorboard")
    with SummaryWriter(str(what.folder / "tensorboard")) as writer:
        text = json.dumps(what.card, indent=2, ensure_ascii=False)
        writer.add_text("card", "".join(f"    {line}\n" for line in text.splitlines()), what.step)
        writer.add_text("examples", markdown_table(what.examples, COLUMNS), what.step)
        for key, value in what.numbers.items():
            writer.add_scalar(key, value, what.step)
    return f"tensorboard --logdir {shlex.quote(str(what.folder.parent))}"


def _to_trackio(what: _Evaluation) -> str:
    from trackio import Table
    from trackio.run import Run
    from trackio.sqlite_storage import SQLiteStorage

    SQLiteStorage.delete_run(what.project, what.name)
    run = Run(None, what.project, None, name=what.name, group="evaluations", config=what.card)
    with redirect_stdout(io.StringIO()):  # it says that it uploads
        run.log({**what.numbers, "examples": Table(list(COLUMNS), what.examples)}, step=what.step)
        run.finish()
    return f"trackio show --project {shlex.quote(what.project)}"


SENDERS = {"wandb": _to_wandb, "tensorboard": _to_tensorboard, "trackio": _to_trackio}
