"""`python -m capo_exp.figures runs=DIR figure=all`: figures and tables from logged runs. Imports no torch."""

import sys
from collections.abc import Sequence

from capo_exp.config.errors import ConfigError
from capo_exp.figures.command import as_typed, draw_figures, figures_help, parse_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws; returns the exit status: 2 for bad input, or if a figure that was asked for cannot be drawn."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(given):
        sys.stdout.write(figures_help())
        return 0
    try:
        return draw_figures(parse_command(given), as_typed(given))
    except (ConfigError, OSError) as error:  # also a full disk
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
