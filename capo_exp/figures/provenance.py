"""Where a figure comes from, written inside each of its files, and read back from there."""

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from capo_exp.figures.compose import Picture
from capo_exp.figures.study import Study, alpha
from capo_exp.runs.read import LoggedRun

KEY = "capo_exp"
"""Of the PNG's text chunk."""
PACKAGES = ("matplotlib", "numpy", "scipy")


def provenance(picture: Picture, study: Study, command: str) -> dict[str, Any]:
    """What the figure is, of which runs, and how it was made. No date, so that it can be made again."""
    runs = {run.path: run for curve in picture.curves for run in curve.runs}
    lines = [panel.spec for panel in picture.panels if panel.spec.key]
    beside = study.reference.runs if study.reference and any(s.reference != "none" for s in lines) else ()
    still = [run for run in study.runs if run.setting("regime.learning_rate") == 0]
    runs |= {run.path: run for run in (*beside, *(still if any(s.start for s in lines) else ()))}
    return {
        "figure": picture.spec.name,
        "command": command,
        "runs": [of_run(run) for run in runs.values()],
        "seeds": {curve.label: len(curve.runs) for curve in picture.curves},
        "statistic": study.statistic,
        "interval": study.interval,
        "smoothing": {spec.key: alpha(study, spec) for spec in lines},
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def of_run(run: LoggedRun) -> dict[str, Any]:
    """Id, commit, whether the code had uncommitted changes, and how far the run was."""
    git = run.record.get("git") or {}
    return {
        "id": run.record.get("run_id", run.name),
        "name": run.name,
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "steps": len(run.metrics),
    }


def as_line(values: Mapping[str, Any]) -> str:
    """ASCII JSON that can stand in any comment: without two dashes in a row, which end one in HTML."""
    return json.dumps(values, separators=(",", ":")).replace("--", "-\\u002d")


def comments(values: Mapping[str, Any], mark: str) -> str:
    """Comment lines for CSV (`#`) and LaTeX (`%`): one that says what it is, then JSON."""
    return f"{mark} capo_exp.figures: {values['command']}\n{mark} {as_line(values)}\n"


def markdown_comment(values: Mapping[str, Any]) -> str:
    """The same where a comment is HTML's."""
    return f"<!-- {as_line(values)} -->\n"


def png_metadata(values: Mapping[str, Any], title: str) -> dict[str, str]:
    """Text chunks of a PNG."""
    return {"Title": title, "Software": "matplotlib", KEY: as_line(values)}


def pdf_metadata(values: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Entries of a PDF's information dictionary; no date."""
    own = {"Title": title, "Subject": as_line(values), "Creator": KEY}
    return {**own, "Producer": "matplotlib", "CreationDate": None}
