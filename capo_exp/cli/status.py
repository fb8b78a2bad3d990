"""`python -m capo_exp.status`: the table of runs, what they take on disk, and a way to free it. No torch."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from capo_exp.cli import front
from capo_exp.config.errors import ConfigError, printable
from capo_exp.config.memory import human
from capo_exp.runs.disk import DiskUse, find_removable, measure, measure_run
from capo_exp.runs.files import remove
from capo_exp.runs.lock import locked
from capo_exp.runs.read import find_runs
from capo_exp.runs.record import run_status
from capo_exp.sweep.processes import say
from capo_exp.sweep.table import console, runs_table, summarise_run

USAGE = """\
python -m capo_exp.status [DIR ...] [--disk | --clean [--final-model] [--yes]]

Shows which runs there are, and how far each one is: state, steps, accuracy, rejected tokens, time left.
--disk shows what they take on disk. --clean deletes the checkpoints of finished runs but the last of each,
which is the model; it lists them and asks first.

{keys}
Exit status: 0, 2 = wrong input.
"""
FLAGS = {
    "--disk": "disk=true",
    "--clean": "clean=true",
    "--final-model": "final_model=true",
    "--yes": "ask=false",
}
"""Short for keys of the command."""


@dataclass(frozen=True)
class StatusCommand:
    """The keys of conf/status.yaml."""

    runs: list[str] = field(default_factory=list)
    disk: bool = False
    clean: bool = False
    final_model: bool = False
    ask: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [FLAGS.get(word, word) for word in given]
    line = front.CommandLine("status", StatusCommand, lambda: USAGE, words="runs")
    return front.run_command(show_status, line, words)


def show_status(command: StatusCommand) -> int:
    """Prints the table of runs, or what they take, or deletes checkpoints."""
    paths = find_runs([Path(name) for name in command.runs])
    if command.clean:
        return clean(paths, command)
    if command.final_model or not command.ask:
        raise ConfigError("--final-model, --yes: expected --clean beside them")
    if command.disk:
        console().print(disk_table(paths))
        return 0
    runs = [summarise_run(path) for path in paths]
    console().print(runs_table(runs))
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console().print(f"{len(runs)} runs: {counts}")
    return 0


def disk_table(paths: Sequence[Path]) -> Table:
    """Returns what each run takes on disk, the largest first, and their sum."""
    used = {path: measure_run(path) for path in paths}
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for column in DiskUse._fields:
        table.add_column(column, justify="right", no_wrap=True)
    for path, use in sorted(used.items(), key=lambda pair: -pair[1].total):
        table.add_row(Text(printable(path.name)), run_status(path), *map(human, use))
    table.add_row(f"{len(used)} runs", "", *(human(sum(sizes)) for sizes in zip(*used.values(), strict=True)))
    return table


def clean(paths: Sequence[Path], command: StatusCommand) -> int:
    """Deletes checkpoints of finished runs, once they are listed and somebody has agreed.

    Raises:
        ConfigError: there is nobody to ask, or a run has begun again; what is listed before it is deleted.
    """
    found: dict[Path, list[Path]] = {}
    for path in paths:
        if (real := os.path.realpath(path)) != os.path.abspath(path):  # a stranger's link, maybe
            say(f"left alone, for a link leads to it; name it as {printable(real)}: {printable(path)}")
        elif (state := run_status(path)) == "finished":
            found[path] = find_removable(path, final_model=command.final_model)
        elif (path / "checkpoints").is_dir():
            say(f"left alone, for it is {state}: {printable(path)}")
    sizes = {checkpoint: measure(checkpoint) for listed in found.values() for checkpoint in listed}
    for checkpoint, size in sizes.items():
        say(f"{human(size):>8}  {printable(checkpoint)}")
    if not sizes:
        say("nothing to delete")
    elif command.ask and not _agreed(f"delete {_counted(sizes.values())}? [y/N] "):
        say("nothing is deleted")
    else:
        say(f"deleted {_counted([sizes[checkpoint] for checkpoint in _delete(found)])}")
    return 0


def _counted(sizes: Collection[int]) -> str:
    return f"{len(sizes)} checkpoints, {human(sum(sizes))}"


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("--clean: nobody can be asked here; expected --yes beside it")
    return input(question).strip().lower() in ("y", "yes")


def _delete(found: Mapping[Path, Sequence[Path]]) -> Iterator[Path]:
    """Deletes checkpoints and yields each; those of a run that was begun anew meanwhile stay."""
    for path, checkpoints in found.items():
        with locked(path):
            for checkpoint in checkpoints if run_status(path) == "finished" else ():
                remove(checkpoint)
                yield checkpoint
