"""The command line of `python -m capo_exp.figures`: key=value, as Hydra has it, read strictly."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from omegaconf import MISSING

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.figures.catalogue import check_metric, defaults, figure_names, read_figure, typed
from capo_exp.figures.intervals import Interval, Statistic

CHOICES = {"statistic": get_args(Statistic), "interval": get_args(Interval), "report": ("html", "none")}
SMOOTHING = ("paper", "off")


@dataclass(frozen=True)
class Command:
    """What to draw of which runs. Defaults: conf/figure/_defaults.yaml."""

    runs: list[str] = field(default_factory=list)  # run directories, folders of runs, globs
    figure: list[str] = field(default_factory=list)  # names, or all
    output: str | None = MISSING  # folder; null = figures/ in the runs' common parent
    smoothing: str = MISSING  # paper | off | weight of a new value, 0 to 1
    statistic: str = MISSING  # of seeds: mean | iqm
    interval: str = MISSING  # over seeds: bootstrap | t | sem
    mix: bool = MISSING  # draw runs together that cannot be compared
    report: str = MISSING  # html | none
    x: str | None = MISSING  # counter/... in place of the figures' own x axis
    keys: list[str] = field(default_factory=list)  # metrics of figure=metrics


LISTS = ("runs", "figure", "keys")
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


def parse(arguments: Sequence[str]) -> Command:
    """Raises:
    ConfigError: an unknown key or value; no runs.
    """
    given: dict[str, Any] = {}
    known = list(defaults()["command"])
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: expected key=value, with one of {', '.join(known)}")
        if key not in known:
            raise ConfigError(f"{argument}: unknown key; {suggest(key, known)}")
        given[key] = entries(value) if key in LISTS else None if value in ("null", "") else value
    if given.get("keys") and "figure" not in given:
        given["figure"] = ["metrics"]
    command = typed(Command, {**defaults()["command"], **given}, "command line")
    check(command)
    return command


def entries(value: str) -> list[str]:
    """`a,b` or `[a,b]`."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [entry.strip() for entry in inner.split(",") if entry.strip()]


def check(command: Command) -> None:
    """Raises:
    ConfigError: a value that is none of the choices; no runs.
    """
    for key, choices in CHOICES.items():
        if (value := getattr(command, key)) not in choices:
            raise ConfigError(f"{key}={value}; {suggest(value, choices)}")
    if command.x is not None and command.x not in (axes := list(defaults()["x_labels"])):
        raise ConfigError(f"x={command.x}; {suggest(command.x, axes)}")
    for key in command.keys:
        check_metric(key, "keys")
    if not command.runs:
        raise ConfigError("runs: no value; expected directories of runs, such as runs=outputs/tiny_figure_1")
    if not command.figure:
        raise ConfigError("figure: no value; expected all, or names that --help lists")
    smoothing(command)


def smoothing(command: Command) -> float | None:
    """Weight of a new value; None = as each figure has it.

    Raises:
        ConfigError: neither a known word nor a number above 0 up to 1.
    """
    words = {"paper": None, "off": 1.0}
    if command.smoothing in words:
        return words[command.smoothing]
    try:
        weight = float(command.smoothing)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1:
        wrong = f"smoothing={command.smoothing}; expected {', '.join(SMOOTHING)} or a number above 0 up to 1"
        raise ConfigError(wrong)
    return weight


def help_text() -> str:
    """Keys, and the figures with a line each."""
    specs = [read_figure(name) for name in figure_names()]
    listed = [f"  {', '.join([spec.name, *spec.alias]):24} {spec.summary}" for spec in specs]
    return HELP.format(axes=", ".join(defaults()["x_labels"]), figures="\n".join(listed))


def as_typed(arguments: Sequence[str]) -> str:
    """The command that a shell would take."""
    return shlex.join(["python", "-m", "capo_exp.figures", *arguments])
