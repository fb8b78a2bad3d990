"""Writes the offline W&B run of run directories anew, such as of a run that was killed, from their files.

    python scripts/write_wandb.py outputs/default ...

prints for each the `wandb sync` that uploads it. Runs in progress are left alone.
"""

import sys

from capo_exp.config.errors import ConfigError
from capo_exp.runs.lock import InProgress, locked
from capo_exp.runs.read import find_runs
from capo_exp.runs.record import MEDIA
from capo_exp.runs.trackers import Tracker


def main(folders: list[str]) -> int:
    """Returns the exit status: 2 if there is no run, or one that cannot be written; the others are."""
    wrong = 0
    try:
        for directory in find_runs(folders):
            try:
                with locked(directory):
                    run = Tracker(directory, "wandb", "offline")
                    sys.stdout.write(f"{run.location}\n")
                    run.finish(0, [path for path in map(directory.joinpath, MEDIA) if path.exists()])
            except InProgress:
                sys.stdout.write(f"{directory}: in progress\n")
            except ConfigError as error:
                wrong = 2
                sys.stderr.write(f"{error}\n")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
