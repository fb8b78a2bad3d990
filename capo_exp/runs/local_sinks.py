"""Trackers on this machine: TensorBoard in a folder of its own, Trackio in its local database.

Both are written anew from the files when a run goes on, so `there` is 0.
"""

import io
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from capo_exp.runs.files import keep_id, remove
from capo_exp.runs.samples import Sample


class TensorBoardSink:
    """Owns FOLDER/tensorboard: scalars, histograms, completions as text, and run.png."""

    there = 0

    def __init__(self, folder: Path, heading: str, text: str, x: int = 0) -> None:
        """Opens it with a text, such as the configuration."""
        from torch.utils.tensorboard import SummaryWriter

        remove(folder / "tensorboard")
        self.location = f"tensorboard --logdir {shlex.quote(str(folder.parent))}"
        self._writer, self._x = SummaryWriter(str(folder / "tensorboard")), x
        self._writer.add_text(heading, "".join(f"    {line}\n" for line in text.splitlines()), x)

    def log(self, number: int, x: int, row: Mapping[str, float], sample: Sample | None) -> None:
        """Writes a row, whose completions become a table in Markdown."""
        self._x = x
        for key, value in row.items():
            self._writer.add_scalar(key, value, self._x)
        if sample is not None:
            self._writer.add_text(sample.name, markdown_table(sample.rows, sample.columns), self._x)
            for key, values in sample.histograms.items():
                self._writer.add_histogram(key, values, self._x)
        self._writer.flush()  # a kill loses nothing, and a full disk says so here

    def finish(self, exit_code: int, media: Sequence[Path]) -> None:
        """Writes the pictures; TensorBoard shows no pages."""
        from matplotlib.image import imread

        for path in media:
            if path.suffix == ".png":
                self._writer.add_image(f"run/{path.stem}", imread(path), self._x, dataformats="HWC")
        self._writer.close()


class TrackioSink:
    """Owns a run of Trackio's local database. No server is started, and none is sent anything."""

    there = 0

    def __init__(self, folder: Path, project: str, name: str, group: str, config: dict[str, Any]) -> None:
        """Opens it; FOLDER/trackio_id tells it from a run of the same name that has another folder."""
        from trackio.run import Run
        from trackio.sqlite_storage import SQLiteStorage

        self.location, self._x = f"trackio show --project {shlex.quote(project)}", 0
        own = keep_id(folder / "trackio_id", secrets.token_hex(16))
        SQLiteStorage.delete_run(project, name, own)
        # trackio.init would follow TRACKIO_SPACE_ID to a Space.
        self._run = Run(None, project, None, name=name, run_id=own, group=group, config=config)

    def log(self, number: int, x: int, row: Mapping[str, float], sample: Sample | None) -> None:
        """Sends a row with its completions and histograms to Trackio's thread, which writes it."""
        self._x, shown = x, dict[str, Any](row)
        if sample is not None:
            from trackio import Histogram, Table

            shown[sample.name] = Table(list(sample.columns), sample.rows)
            shown |= {key: Histogram(values) for key, values in sample.histograms.items()}
        self._run.log(shown, step=self._x)

    def finish(self, exit_code: int, media: Sequence[Path]) -> None:
        """Sends the pictures, and waits until all is written."""
        from trackio import Image

        shown = {f"run/{path.stem}": Image(str(path)) for path in media if path.suffix == ".png"}
        if shown:
            self._run.log(shown, step=self._x)
        with redirect_stdout(io.StringIO()):  # it says that it uploads
            self._run.finish()


def markdown_table(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> str:
    """Returns completions as a table in Markdown, each in one line.

    What stands in it is text alone: a prompt or completion cannot make whoever looks at it fetch an image.
    """
    cells = [map(_in_one_line, row) for row in (columns, *rows)]
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def _in_one_line(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.3g}"
    text = re.sub(r"[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+", "⏎", str(cell))
    return re.sub(r"[\\`*_{}\[\]()#+!|<>&~$-]", lambda mark: f"&#{ord(mark[0])};", text)
