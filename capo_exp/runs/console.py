"""What a person sees of a run: a live table on a terminal, plain lines in a log, a table at the end."""

import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.live import Live

from capo_exp.config.errors import printable
from capo_exp.runs import metrics as names
from capo_exp.runs.live import live_table
from capo_exp.runs.read import RECENT, LoggedRow, load_run, values
from capo_exp.runs.record import MEDIA
from capo_exp.runs.wandb_sink import write_command

SHOWN = {
    names.TRAIN_ACCURACY: "acc {:.1%}",
    names.REJECTION_RATE: "rejected {:.2%}",
    names.POLICY_SHIFT + "p99": "shift {:.1e}",
    names.TOKENS_PER_SECOND: "{:,.0f} tok/s",
}
"""What a step's line shows, short enough for 80 columns; a metric that is not there is left out."""
SHOWN_FILES = (
    "metrics.jsonl", "eval.jsonl", "completions", "checkpoints", "config.yaml", "run.json", *MEDIA,
)  # fmt: skip


class Output(Console):
    """Lets its reader be gone, such as a `tee` that the same Ctrl-C has ended, where rich would exit."""

    def on_broken_pipe(self) -> None:
        """Writes no more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Owns the console while a run of `total_steps` goes on, of which a resumed one has done `first_step`.

    On a terminal a live table of how the run is going; elsewhere a plain line for the first and the last step
    and at most one every `every_seconds` between them. `past` are the rows that the run has logged already.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        past: Sequence[LoggedRow] = (),
        every_seconds: float = 10.0,
        console: Console | None = None,
    ) -> None:
        self._console = console or Output(highlight=False)
        self._total, self._first, self._every = total_steps, first_step, every_seconds
        self._began = self._last_line = -float("inf")
        self._seen: list[LoggedRow] = list(past)
        self._place = (first_step, "")
        live = Live(console=self._console, auto_refresh=False)
        self._live = live if self._console.is_terminal else None

    def update(self, metrics: Mapping[str, float]) -> None:
        """Shows a rollout step that is done; `counter/rollout_step` has to be there."""
        step = int(metrics[names.STEP])
        done, seconds = step - self._first, time.monotonic() - self._began
        left = timedelta(seconds=round(seconds / done * (self._total - step) if done > 0 else 0))
        if self._live is not None:
            self._place = (step, f"{metrics.get(names.TOKENS_PER_SECOND, 0):,.0f} tok/s  left {left}")
            self._show(metrics)
        elif step == self._total or time.monotonic() - self._last_line >= self._every:
            self._last_line = time.monotonic()
            self.message(f"step {step}/{self._total}  {format_step(metrics)}  left {left}")

    def _show(self, *rows: Mapping[str, float]) -> None:
        assert self._live is not None
        self._seen += [{**row} for row in rows]
        plain, (step, pace) = "utf" not in self._console.encoding.lower(), self._place
        with _if_it_is_there():
            self._live.update(live_table(self._seen, step, self._total, pace, plain=plain), refresh=True)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Shows the score of an evaluation, on a terminal in the table."""
        if self._live is not None:
            self._show(metrics)
        else:
            score = metrics[names.EVAL_ACCURACY]
            self.message(f"evaluation after step {metrics[names.STEP]:.0f}: {score:.1%}")

    def message(self, text: str) -> None:
        """Prints a line of its own above the live line; what a console of few characters lacks is escaped."""
        encoding = self._console.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with _if_it_is_there():
            self._console.print(text, markup=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self._live is not None:
            self._live.start()
            self._show()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._live is not None:
            with _if_it_is_there():
                self._live.stop()


@contextmanager
def _if_it_is_there() -> Iterator[None]:
    """Lets a terminal be gone that was closed just now: the signal that says so may come a moment later."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def format_step(metrics: Mapping[str, float]) -> str:
    """Returns such as `acc 41.7%  rejected 0.35%  shift 3.1e-05  2,410 tok/s`, with policy_shift's p99."""
    return "  ".join(form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics)


def summary_lines(run_dir: Path) -> list[str]:
    """Returns what a run came to and where each file is, from the files of its directory; paths stay whole.

    Raises:
        FileNotFoundError: It is no run's directory.
    """
    run = load_run(run_dir)
    files = [name for name in SHOWN_FILES if (run_dir / name).exists()]
    rows = _outcome(run.metrics, run.evaluations)
    if (seconds := run.record.get("wall_seconds")) is not None:
        rows.append(("wall time", str(timedelta(seconds=round(seconds)))))
    rows += [("files", " ".join(files)), ("directory", str(run_dir))]
    rows += [("left out", text) for text in run.left_out]
    if location := run.record.get("tracker") or run.record.get("wandb"):  # older runs have the second
        if location.startswith("wandb sync ") and not list((run_dir / "wandb").glob("offline-run-*")):
            location = f"W&B's run was not written; this does: {write_command(run_dir)}"
        rows.append(("tracker", location))
    lines = [str(run.record.get("name", run_dir.name)), *(f"{label:18} {value}" for label, value in rows)]
    return [printable(line.replace("\n", "?")) for line in lines]


def _outcome(metrics: list[LoggedRow], evaluations: list[LoggedRow]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if held_out := values(evaluations, names.EVAL_ACCURACY):
        first, last = held_out[0], held_out[-1]
        rows.append(("held-out accuracy", f"{first:.1%} -> {last:.1%}, best {max(held_out):.1%}"))
    if training := values(metrics, names.TRAIN_ACCURACY):
        recent = training[-RECENT:]
        rows.append(("training accuracy", f"{fmean(recent):.1%}, mean of the last {len(recent)} steps"))
    if rejected := values(metrics, names.REJECTION_RATE):
        rows.append(("rejected tokens", f"mean {fmean(rejected):.2%}, max {max(rejected):.2%}"))
    counters = {"steps": names.STEP, "completions": names.COMPLETIONS, "tokens": names.GENERATED_TOKENS}
    counted = {label: values(metrics, key) for label, key in counters.items()}
    return rows + [(label, f"{found[-1]:,.0f}") for label, found in counted.items() if found]
