"""The command line of `python -m capo_exp.figures`: key=value, as Hydra has it, read strictly."""

import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.core.intervals import Interval, Statistic
from capo_exp.figures.curves import curves
from capo_exp.figures.gallery import FIGURES, find_figure
from capo_exp.figures.output import DrawnFigure, write_figure
from capo_exp.figures.page import compose
from capo_exp.figures.study import X_LABELS, Study
from capo_exp.runs import metrics as names
from capo_exp.runs.read import find_runs, load_run, to_its_end

CHOICES = {
    "statistic": get_args(Statistic), "interval": get_args(Interval), "report": ("html", "none"),
    "x": (None, *X_LABELS),
}  # fmt: skip
LISTS = ("runs", "figure", "keys")


@dataclass(frozen=True)
class FigureCommand:
    """What to draw of which runs."""

    runs: list[str] = field(default_factory=list)  # run directories, folders of runs, globs
    figure: list[str] = field(default_factory=lambda: ["all"])
    output: str | None = None  # folder; null = figures/ in the runs' common parent
    smoothing: str = "paper"  # paper | off | weight of a new value, 0 to 1
    statistic: str = "mean"
    interval: str = "bootstrap"
    x: str | None = None  # counter/... in place of the figures' own x axis
    keys: list[str] = field(default_factory=list)  # metrics of figure=metrics
    mix: bool = False
    report: str = "none"

    @property
    def weight(self) -> float | None:
        """Returns the weight of a new value; None = as each figure has it.

        Raises:
            ConfigError: neither a known word nor a number above 0 up to 1.
        """
        words = {"paper": None, "off": 1.0}
        if self.smoothing in words:
            return words[self.smoothing]
        try:
            weight = float(self.smoothing)
        except ValueError:
            weight = 0.0
        if not 0 < weight <= 1:
            expected = f"expected {', '.join(words)} or a number above 0 up to 1"
            raise ConfigError(f"smoothing={self.smoothing}; {expected}")
        return weight


HELP = """\
python -m capo_exp.figures runs=DIR[,DIR...] [key=value ...]

Figures and tables from logged runs: NAME.png, .pdf, .csv, .md and .tex of each. Reads files, trains nothing.

  runs=outputs/tiny_figure_1    runs: directories, folders of runs, globs
  figure=all                    all, or names from the list below
  output=DIR                    where to write; default: figures/ in the runs' common parent
  smoothing=paper               paper | off | weight of a new value in the moving average, 0 to 1
  statistic=mean                of seeds: mean | iqm
  interval=bootstrap            over seeds: bootstrap | t (both 95 %) | sem (one standard error, the paper's)
  x=counter/...                 another x axis: {axes}
  keys=policy/entropy,...       any metrics, for figure=metrics
  mix=false                     true draws runs together that differ in model, problems or sampling
  report=none                   html: one page with figures, tables and completions

Figures:
{figures}
"""


def figures_help() -> str:
    """Returns the keys, and the figures with a line each."""
    listed = {", ".join(filter(None, (name, spec.alias))): spec for name, spec in FIGURES.items()}
    said = {name: (spec.panels.__doc__ or "").removeprefix("Draws ") for name, spec in listed.items()}
    lines = [f"  {name:24} {text.splitlines()[0].removesuffix('.')}" for name, text in said.items()]
    return HELP.format(axes=", ".join(X_LABELS), figures="\n".join(lines))


def parse_command(arguments: Sequence[str]) -> FigureCommand:
    """Reads the arguments.

    Raises:
        ConfigError: an unknown key or value; no runs.
    """
    given: dict[str, Any] = {}
    known = [item.name for item in fields(FigureCommand)]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: expected key=value, with one of {', '.join(known)}")
        if key not in known:
            raise ConfigError(f"{argument}: unknown key; {suggest(key, known)}")
        given[key] = _entries(value) if key in LISTS else None if value in ("null", "") else value
    if given.get("keys") and "figure" not in given:
        given["figure"] = ["metrics"]
    try:
        command = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(FigureCommand), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(command, FigureCommand)
    _check(command)
    return command


def _entries(value: str) -> list[str]:
    """Reads `a,b` or `[a,b]`."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [entry.strip() for entry in inner.split(",") if entry.strip()]


def _check(command: FigureCommand) -> None:
    for key, choices in CHOICES.items():
        if (value := getattr(command, key)) not in choices:
            raise ConfigError(f"{key}={value}; {suggest(value, [c for c in choices if c])}")
    for key in command.keys:
        if names.meaning(key) is None:
            raise ConfigError(f"keys: no metric {key}; {_nearest(key)}")
    if not command.runs:
        raise ConfigError("runs: no value; expected directories of runs, such as runs=outputs/tiny_figure_1")
    if not command.figure:
        raise ConfigError("figure: no value; expected all, or names that --help lists")
    assert command.weight is None or command.weight > 0


def _nearest(name: str) -> str:
    """Says the few known metrics nearest to a wrong one: a list of all would be too long."""
    choices, last = list(names.METRICS), name.rsplit("/", 1)[-1]
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5) or [c for c in choices if last in c][:3]
    return f"nearest: {', '.join(close)}" if close else "capo_exp/runs/metrics.py has them all"


def as_typed(arguments: Sequence[str]) -> str:
    """Returns the command that a shell would take."""
    return shlex.join(["python", "-m", "capo_exp.figures", *arguments])


def load_study(command: FigureCommand, paths: Sequence[Path]) -> Study:
    """Loads the runs.

    Raises:
        ConfigError: a file is damaged, or the runs cannot be compared.
    """
    runs = tuple(to_its_end(load_run(path)) for path in paths)
    options: Any = {"statistic": command.statistic, "interval": command.interval}
    drawn = tuple(curves(runs, mix=command.mix))
    return Study(runs, drawn, smoothing=command.weight, x=command.x, **options)


def common_parent(paths: Sequence[Path]) -> Path:
    """Returns the folder that all runs are in; of one run, the run itself."""
    alike = len({path.is_absolute() for path in paths}) == 1
    return Path(os.path.commonpath(paths if alike else [path.absolute() for path in paths]))


def draw_figures(command: FigureCommand, typed: str) -> int:
    """Draws what the command asks for; returns the exit status.

    Raises:
        ConfigError: nothing can be drawn of these runs, or nothing written there.
    """
    every = command.figure == ["all"]
    wanted = list(FIGURES) if every else [find_figure(name) for name in command.figure]
    paths = find_runs(command.runs)
    study = load_study(command, paths)
    output = Path(command.output) if command.output else common_parent(paths) / "figures"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: no folder can be made there ({error.strerror})") from error
    drawn: list[DrawnFigure] = []
    for name in wanted:
        try:
            picture = compose(name, study, command.keys if name == "metrics" else ())
            drawn.append(write_figure(picture, output, typed))
            sys.stdout.write(f"figure {name}: {drawn[-1].png}\n")
        except ConfigError as error:
            stream = sys.stdout if every else sys.stderr
            stream.write(f"figure {name}: {'skipped, ' if every else ''}{error}\n")
    if command.report == "html":
        from capo_exp.figures.report.page import write_report  # jinja2 only for whoever asks for a page

        sys.stdout.write(f"report: {write_report(study.runs, study.curves, drawn, output)}\n")
    return 0 if len(drawn) == len(wanted) or (drawn and every) else 2
