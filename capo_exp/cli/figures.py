"""`python -m capo_exp.figures`: figures and tables from logged runs. Imports no torch."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, get_args

from omegaconf import MISSING

from capo_exp.cli import front
from capo_exp.config.errors import ConfigError, RunFailed, suggest
from capo_exp.config.ranges import Rule, one_of, or_null
from capo_exp.config.schema import setting
from capo_exp.core.intervals import Interval, Statistic
from capo_exp.figures.curves import curves, families
from capo_exp.figures.gallery import FIGURES, find_figure
from capo_exp.figures.output import DrawnFigure, as_typed, write_figure
from capo_exp.figures.page import compose
from capo_exp.figures.plots import plot_run
from capo_exp.figures.study import X_LABELS, Study
from capo_exp.runs import metrics as names
from capo_exp.runs.read import LoggedRun, find_runs, load_run, to_its_end

USAGE = """\
python -m capo_exp.figures runs=DIR[,DIR...] [figure=NAME,... key=value ...]

Figures and tables from logged runs: NAME.png, .pdf, .csv, .md and .tex of each. Reads files, trains nothing.

{keys}
Figures:
{figures}

Exit status: 0, 1 = the disk failed, 2 = wrong input, or a figure that was asked for cannot be drawn.
"""
WEIGHTS = {"paper": None, "off": 1.0}
"""Words for a weight of smoothing; None = as each figure has it."""


def _is_weight(text: str) -> bool:
    try:
        return text in WEIGHTS or 0 < float(text) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class FigureCommand:
    """The keys of conf/figures.yaml, which says what each one means."""

    runs: list[str] = setting(Rule(bool, "directories of runs, such as runs=outputs/paper_figure_1-tiny"))
    figure: list[str] = MISSING
    output: str | None = MISSING
    smoothing: str = setting(Rule(_is_weight, "paper, off or a number above 0 up to 1"))
    statistic: str = setting(one_of(*get_args(Statistic)))
    interval: str = setting(one_of(*get_args(Interval)))
    x: str | None = setting(or_null(one_of(*X_LABELS)))
    keys: list[str] = MISSING
    mix: bool = MISSING
    report: str = setting(one_of("html", "none"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    line = front.CommandLine("figures", FigureCommand, _usage, words="runs")
    return front.run_command(partial(draw_figures, typed=as_typed(given)), line, given)


def _usage() -> str:
    listed = {", ".join(filter(None, (name, spec.alias))): spec for name, spec in FIGURES.items()}
    said = {name: (spec.panels.__doc__ or "").removeprefix("Draws ") for name, spec in listed.items()}
    lines = [f"  {name:24} {text.splitlines()[0].removesuffix('.')}" for name, text in said.items()]
    return USAGE.replace("{figures}", "\n".join(lines))


def draw_one(directory: Path) -> list[Path]:
    """Draws what a run leaves when it ends: its picture and its report."""
    from capo_exp.figures.report.page import write_report

    run, made_by = load_run(directory), "the run itself, at its end"
    report_file = write_report([run], list(curves([run], mix=True)), (), directory, made_by)
    return [plot_run(directory), report_file]


def draw_figures(command: FigureCommand, typed: str) -> int:
    """Draws what the command asks for, and returns the exit status.

    All figures of runs that cannot be compared are drawn for each family of runs, in a folder of its own.

    Args:
        command: What to draw.
        typed: The command as a shell takes it, which every file states.
    """
    asked = command.figure or (["metrics"] if command.keys else ["all"])
    every = asked == ["all"]
    wanted = list(FIGURES) if every else [find_figure(name) for name in asked]
    for key in command.keys:
        if names.meaning(key) is None:
            raise ConfigError(f"keys={key}: no such metric; {suggest(key, names.METRICS)}")
    try:
        paths = find_runs(command.runs)
        runs = [load_run(path) for path in paths]
        sys.stderr.writelines(f"left out: {text}\n" for run in runs for text in run.left_out)
        groups = families(runs) if every and not command.mix else [runs]
        output = Path(command.output) if command.output else common_parent(paths) / "figures"
        drawn = 0
        for group, folder in zip(groups, _folders(groups, output), strict=True):
            front.make_folder(folder)
            if len(groups) > 1:
                sys.stdout.write(f"{folder.name}: {len(group)} run{'s' * (len(group) > 1)}\n")
            drawn += _write(group, wanted, command, folder, typed)
        return 0 if drawn == len(wanted) or (drawn and every) else 2
    except OSError as failed:  # such as a full disk
        raise RunFailed(str(failed)) from failed


def _folders(groups: Sequence[Sequence[LoggedRun]], output: Path) -> list[Path]:
    """Returns where the figures of each family go: below `output`, by the folder that its runs are in."""
    if len(groups) == 1:
        return [output]
    folders: list[Path] = []
    for name in (common_parent([run.path for run in group]).name or "runs" for group in groups):
        paths = chain([output / name], (output / f"{name}-{number}" for number in count(2)))
        folders.append(next(path for path in paths if path not in folders))
    return folders


def common_parent(paths: Sequence[Path]) -> Path:
    """Returns the folder that all runs are in; of one run, the run itself."""
    alike = len({path.is_absolute() for path in paths}) == 1
    return Path(os.path.commonpath(paths if alike else [path.absolute() for path in paths]))


def _write(
    logged: Sequence[LoggedRun], wanted: Sequence[str], command: FigureCommand, output: Path, typed: str
) -> int:
    """Writes each figure that these runs have something for, and says which they do not; returns how many."""
    runs = tuple(map(to_its_end, logged))
    options: Any = {"statistic": command.statistic, "interval": command.interval}
    weight = WEIGHTS[command.smoothing] if command.smoothing in WEIGHTS else float(command.smoothing)
    drawn = tuple(curves(runs, mix=command.mix))
    study = Study(runs, drawn, smoothing=weight, x=command.x, **options)
    figures: list[DrawnFigure] = []
    skip = len(wanted) == len(FIGURES)
    for name in wanted:
        try:
            picture = compose(name, study, command.keys if name == "metrics" else ())
            figures.append(write_figure(picture, output, typed))
            sys.stdout.write(f"figure {name}: {figures[-1].png}\n")
        except ConfigError as lack:
            stream = sys.stdout if skip else sys.stderr
            stream.write(f"figure {name}: {'skipped, ' if skip else ''}{lack}\n")
    if command.report == "html":
        from capo_exp.figures.report.page import write_report  # jinja2 only for whoever asks for a page

        sys.stdout.write(f"report: {write_report(logged, study.curves, figures, output, typed)}\n")
    return len(figures)
