"""A figure's files, and where it comes from, which is written inside each of them."""

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from capo_exp.figures import page, style, tables
from capo_exp.figures.page import Picture
from capo_exp.figures.panel import count_drawn
from capo_exp.figures.plots import steps_done
from capo_exp.runs.files import replace_file
from capo_exp.runs.read import LoggedRun

KEY = "capo_exp"
"""Name of the PNG's text chunk."""
PACKAGES = ("matplotlib", "numpy", "scipy")


@dataclass(frozen=True)
class DrawnFigure:
    """One figure on disk, for the report."""

    name: str
    title: str
    caption: str
    png: Path
    csv: Path  # The plotted numbers
    table: tables.TextTable


def as_typed(arguments: Sequence[str]) -> str:
    """Returns the command that a shell would take."""
    return shlex.join(["python", "-m", "capo_exp.figures", *arguments])


def write_figure(picture: Picture, output: Path, command: str) -> DrawnFigure:
    """Draws a figure and writes its files: all of them or, whatever goes wrong, none."""
    says, table = page.caption(picture), tables.table_of(picture.panels)
    # ASCII that can stand in any comment: two dashes in a row would end one of HTML, and what is behind a
    # comma is a cell of CSV, which must not begin as a formula does.
    line = json.dumps(provenance(picture, command), separators=(",", ":")).replace("--", "-\\u002d")
    line = re.sub(r"[,;](?=\s*[=+@\\-])", lambda found: f"\\u{ord(found[0]):04x}", line)
    with rc_context(style.SETTINGS):
        figure = page.draw_page(picture)
        chunks = {"Title": picture.title, "Software": "matplotlib", KEY: line}
        png = style.as_bytes(figure, "png", chunks)
        entries = {"Title": picture.title, "Subject": line, "Creator": KEY, "Producer": "matplotlib"}
        pdf = style.as_bytes(figure, "pdf", {**entries, "CreationDate": None})

    def comments(mark: str) -> str:
        return f"{mark} capo_exp.figures: {' '.join(command.splitlines())}\n{mark} {line}\n"

    inert = says.translate(tables.MARKDOWN)  # a record's name may not make a viewer fetch a picture
    files = {
        ".png": png,
        ".pdf": pdf,
        ".csv": (comments("#") + tables.csv_text(picture.panels)).encode(),
        ".md": f"<!-- {line} -->\n\n## {picture.title}\n\n{tables.markdown(table)}\n{inert}\n".encode(),
        ".tex": (comments("%") + tables.latex(table) + f"% {says}\n").encode(),
    }
    paths = {suffix: output / f"{picture.name}{suffix}" for suffix in files}
    with ExitStack() as stack:
        partial = {suffix: stack.enter_context(replace_file(path)) for suffix, path in paths.items()}
        for suffix, content in files.items():
            partial[suffix].write_bytes(content)
    return DrawnFigure(picture.name, picture.title, says, paths[".png"], paths[".csv"], table)


def provenance(picture: Picture, command: str) -> dict[str, Any]:
    """Says what the figure is, of which runs, and how it was made. No date, so that it can be made again."""
    study, metrics = picture.study, [panel.metric for panel in picture.panels if panel.metric]
    runs = {run.path: run for curve in picture.curves for run in curve.runs}
    lined = any(panel.wants_reference for panel in picture.panels)
    beside = study.reference.runs if study.reference and lined else ()
    still = [run for run in study.runs if run.setting("regime.learning_rate") == 0]
    runs |= {run.path: run for run in (*beside, *(still if any(m.start for m in metrics) else ()))}
    return {
        "figure": picture.name,
        "command": command,
        "runs": [_origin(run) for run in runs.values()],
        "seeds": count_drawn(picture.panels),
        "statistic": study.statistic,
        "interval": study.interval,
        "smoothing": {metric.key: metric.smoothing for metric in metrics},
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _origin(run: LoggedRun) -> dict[str, Any]:
    """Says a run's id, commit, whether the code had uncommitted changes, and how far the run was."""
    git = run.record.get("git") or {}
    said = {"id": run.record.get("run_id", run.name), "name": run.name}
    return {**said, "commit": git.get("commit"), "dirty": git.get("dirty"), "steps": steps_done(run)}
