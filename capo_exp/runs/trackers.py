"""A tracker beside a run's files: W&B, TensorBoard or Trackio, each made from these files and nothing else.

A tracker's row i is row i of the files; a row at which completions were kept brings them, too. TensorBoard,
Trackio and W&B online get the rows as they are logged, behind those that the files had before a resume. W&B
offline is written when the process ends, the whole of it, and so is one that has failed on the way: nothing
here can stop a training run. `python scripts/write_wandb.py DIR` writes the W&B run of one that was killed.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from capo_exp.config.errors import ConfigError
from capo_exp.runs import metrics as names
from capo_exp.runs.local_sinks import TensorBoardSink, TrackioSink
from capo_exp.runs.parse import read_yaml
from capo_exp.runs.read import LoggedRow
from capo_exp.runs.samples import Sample, read_logged, read_sample
from capo_exp.runs.wandb_sink import open_training, resolve_mode, sync_command, write_command

log = logging.getLogger(__name__)


TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard", "trackio": "Trackio"}


class Sink(Protocol):
    """The run of one tracker while it is open."""

    there: int
    """Rows that it has from before; they are not sent again."""

    @property
    def location(self) -> str:
        """A URL, or the command that shows it."""
        ...

    def log(self, number: int, x: int, row: Mapping[str, float], sample: Sample | None) -> None:
        """Takes row `number`, which stands at x; NaN is what was not finite."""
        ...

    def finish(self, exit_code: int, media: Sequence[Path]) -> None:
        """Takes the pictures and pages of the run, and ends; 0 means success."""
        ...


class Tracker:
    """Owns the tracker's run of a run directory, which has config.yaml and run.json; see the module."""

    def __init__(self, run_dir: Path, name: str, wandb_mode: str) -> None:
        """Opens the tracker unless it is W&B offline, and sends the rows that it lacks.

        Raises:
            ConfigError: W&B refuses or cannot be reached, and the mode is online; `auto` goes on offline.
        """
        self._run_dir, self._name = run_dir, name
        settings = read_yaml(run_dir / "config.yaml").get("logger", {})
        self._histograms_every: int = settings.get("histograms_every", 1)  # older runs have none
        self._sink: Sink | None = None
        if name != "wandb" or resolve_mode(wandb_mode) == "online":
            try:
                self._open("online")
            except ConfigError:
                raise
            except Exception as error:
                if name == "wandb" and wandb_mode == "online":
                    raise ConfigError(f"no W&B ({error}); or use logger.wandb_mode=offline") from error
                self._give_up(error)

    def send(self, row: LoggedRow) -> None:
        """Sends a row that is in the files already; after a failure the whole is written at the end."""
        if self._sink is not None:
            try:
                self._log(self._sink, row)
            except Exception as error:  # such as its process killed: whatever it is, training goes on
                self._give_up(error)

    @property
    def location(self) -> str:
        """Where to look, or the command that uploads W&B's run once the process has ended."""
        if self._sink is not None:
            return self._sink.location
        if self._name == "wandb":
            return sync_command(self._run_dir)
        return f"{TITLES[self._name]}, once the run has ended"

    def finish(self, exit_code: int, media: Sequence[Path] = ()) -> None:
        """Ends the tracker's run, 0 means success; one that is not open is written here, the whole of it."""
        try:
            sink = self._sink or self._open("offline")
            sink.finish(exit_code, media)
        except Exception as error:
            again = ""
            if self._name == "wandb":
                again = f", `{write_command(self._run_dir)}` writes it"
            whole = "the files have all of it"
            log.warning("%s's run is not complete (%s); %s%s", TITLES[self._name], error, whole, again)

    def _open(self, mode: str) -> Sink:
        self._sink = sink = open_sink(self._run_dir, self._name, mode)
        self._row, self._sampled = 0, 0
        for row in read_logged(self._run_dir):
            self._log(sink, row)
        return sink

    def _log(self, sink: Sink, row: LoggedRow) -> None:
        number, step = self._row, int(row[names.STEP] or 0)
        self._row += 1
        sample = None
        if step > self._sampled:  # of several rows of a step the first brings its completions
            self._sampled = step
            every = self._histograms_every
            if number >= sink.there:
                sample = read_sample(self._run_dir, step, histograms=every > 0 and step % every == 0)
        numbers = {key: math.nan if value is None else value for key, value in row.items()}
        sink.log(number, int(row[names.COMPLETIONS] or 0), numbers, sample)

    def _give_up(self, error: object) -> None:
        said = str(error).splitlines()[:1] or [type(error).__name__]
        later = "it is written from the files when the run ends"
        if self._name == "wandb":
            later = "the run goes on offline, upload it later with `wandb sync`"
        log.warning("no %s (%s): %s", TITLES[self._name], said[0], later)
        self._sink = None
        if self._name == "wandb":
            with suppress(Exception):  # its connection may be gone, too; and it still owns the id
                import wandb

                wandb.teardown()


def open_sink(run_dir: Path, name: str, mode: str) -> Sink:
    """Opens the tracker's run of a run directory; `mode` is for W&B."""
    if name == "wandb":
        return open_training(run_dir, mode)
    if name == "tensorboard":
        return TensorBoardSink(run_dir, "config", (run_dir / "config.yaml").read_text(encoding="utf-8"))
    config = read_yaml(run_dir / "config.yaml")
    return TrackioSink(run_dir, config["logger"]["project"], run_dir.name, config["experiment_name"], config)
