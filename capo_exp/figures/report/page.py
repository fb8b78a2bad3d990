"""One HTML file about a set of runs: tables, figures, and what the model wrote, token by token.

It needs no network and no other file. Its content security policy forbids both, and allows no script but
those of assets/, whose hashes it states: what a model wrote cannot run, whatever it wrote.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image

from capo_exp.figures import style, tables
from capo_exp.figures.curves import Curve
from capo_exp.figures.output import DrawnFigure
from capo_exp.figures.report import overview
from capo_exp.figures.report.viewer import excerpts, viewer_data
from capo_exp.runs.files import write_atomic
from capo_exp.runs.read import RECENT, LoggedRun

ASSETS = Path(__file__).parent / "assets"
MAX_CSV_BYTES = 500_000
"""A larger CSV stays a file beside the page."""
CSS_DPI = 96


def write_report(
    runs: Sequence[LoggedRun],
    curves: Sequence[Curve],
    figures: Sequence[DrawnFigure],
    output: Path,
    made_by: str,
) -> Path:
    """Writes the page, which says what it was made by, to the file `output`, or as report.html into a folder.

    The curves give the runs their order and labels; a run of none is called by its folder, and last.
    """
    runs = overview.in_order(runs, curves)
    named = overview.run_labels(runs, curves)
    taken = excerpts(runs)
    data = viewer_data(taken, named)
    names = ("report.css", "summary.js", "viewer.js")  # ours, so nothing in them is escaped
    css, summary_js, viewer_js = (Markup((ASSETS / name).read_text(encoding="utf-8")) for name in names)
    strict: Any = {"undefined": StrictUndefined, "keep_trailing_newline": True}
    pages = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, **strict)
    html = pages.get_template("report.html").render(
        title=page_title(runs),
        policy=content_security_policy([summary_js, viewer_js], [css]),
        css=css,
        summary_js=summary_js,
        viewer_js=viewer_js,
        columns=overview.COLUMNS,
        recent=RECENT,
        summary=overview.overview(runs, named, curves),
        figures=[embedded(figure) for figure in figures],
        differences=overview.differing(runs, named),
        notes=[(label, part.note) for label, part in zip(named, taken, strict=True)],
        provenance=overview.origins(runs, made_by),
        # ASCII without `<`: a completion may have `</script>`, or U+2028, which ends a line of JavaScript.
        data=htmlsafe_json_dumps(data, allow_nan=False, separators=(",", ":")) if data["runs"] else None,
    )
    path = output if output.suffix == ".html" else output / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate of a JSON file has no UTF-8.
    write_atomic(path, html.encode("utf-8", errors="replace").decode("utf-8"))
    return path


def page_title(runs: Sequence[LoggedRun]) -> str:
    """Returns the experiments' names and the number of runs."""
    found = dict.fromkeys(str(run.setting("experiment_name", run.path.parent.name)) for run in runs)
    return f"{', '.join(found)}: {len(runs)} run{'' if len(runs) == 1 else 's'}"


def content_security_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Forbids network, frames and forms, and allows data: images and just these scripts and styles."""
    hashes = [" ".join(map(_hash, texts)) for texts in (scripts, styles)]
    allowed = f"default-src 'none'; img-src data:; script-src {hashes[0]}; style-src {hashes[1]}"
    return f"{allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(figure: DrawnFigure) -> dict[str, Any]:
    """Returns a figure as it stands in the page; image and CSV are data: URIs, None if too large."""
    png, csv = figure.png.read_bytes(), figure.csv.read_bytes()
    return {
        **vars(figure),
        "image": data_uri("image/png", png),
        "size": screen_size(png),
        "csv": data_uri("text/csv;charset=utf-8", csv) if len(csv) <= MAX_CSV_BYTES else None,
        "csv_name": figure.csv.name,
        "markdown": tables.markdown(figure.table),
    }


def screen_size(png: bytes) -> tuple[int, int]:
    """Returns width and height that a figure was designed for: its pixels at the style's resolution."""
    scale = CSS_DPI / style.SETTINGS["savefig.dpi"]
    width, height = Image.open(io.BytesIO(png)).size
    return round(width * scale), round(height * scale)


def data_uri(kind: str, content: bytes) -> str:
    """Returns the content as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
