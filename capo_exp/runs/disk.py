"""What runs take on disk, and which checkpoints nobody goes on from. Imports no torch."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from capo_exp.runs.checkpoint import find_damage
from capo_exp.runs.files import list_checkpoints


class DiskUse(NamedTuple):
    """Bytes of one run directory."""

    checkpoints: int
    completions: int
    rest: int
    total: int


def measure_run(run_dir: Path) -> DiskUse:
    """Measures a run directory; a folder of it that is a link to another disk counts, too."""
    sizes = {path.name: measure(path) for path in run_dir.iterdir()}
    checkpoints, completions = sizes.pop("checkpoints", 0), sizes.pop("completions", 0)
    rest = sum(sizes.values())
    return DiskUse(checkpoints, completions, rest, checkpoints + completions + rest)


def measure(place: Path) -> int:
    """Returns the bytes of a file or of a folder with all that is in it; links inside are not followed."""
    if not place.is_dir():
        return place.lstat().st_size
    files = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
    total = 0
    for path in files:
        with suppress(OSError):  # of a run that goes on, one may have gone
            total += path.lstat().st_size
    return total


def find_removable(run_dir: Path, *, final_model: bool) -> list[Path]:
    """Returns the checkpoints of a finished run that can go: all but the newest whole one, or that, too.

    A newer one that is damaged stays beside it. Reads the newest to the end. Where a link leads out of the
    run, what is there may be another's: none of it can go.
    """
    if (run_dir / "checkpoints").is_symlink():
        return []
    checkpoints = list(list_checkpoints(run_dir).values())
    if final_model:
        return checkpoints
    while checkpoints:
        if find_damage(checkpoints.pop(), None) is None:
            return checkpoints
    return []
