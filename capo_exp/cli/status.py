"""`python -m capo_exp.status`: prints the table of runs. Reads files, not torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from capo_exp.cli import front
from capo_exp.runs.read import find_runs
from capo_exp.sweep.table import WIDTH, runs_table, summarise_run

USAGE = """\
python -m capo_exp.status [DIR ...]

Shows which runs there are, and how far each one is: state, steps, accuracy, rejected tokens, time left.

{keys}
Exit status: 0, 2 = wrong input.
"""


@dataclass(frozen=True)
class StatusCommand:
    """The keys of conf/status.yaml."""

    runs: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    line = front.CommandLine("status", StatusCommand, lambda: USAGE, words="runs")
    return front.run_command(show_status, line, arguments)


def show_status(command: StatusCommand) -> int:
    """Prints the table of runs."""
    runs = [summarise_run(path) for path in find_runs([Path(name) for name in command.runs])]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(runs_table(runs))
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"{len(runs)} runs: {counts}")
    return 0
