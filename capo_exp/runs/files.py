"""A disk that takes no more: what could not be written, and how to go on, in one line. Imports no torch."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capo_exp.config.errors import ConfigError, RunFailed

STOPS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
"""Full, over the quota, beyond the largest file allowed, read-only, broken, gone (a network's)."""


def reason(error: BaseException | None) -> int | None:
    """The number in STOPS that an error or one that it came from has; None if it is about something else.

    torch raises a RuntimeError with the OSError behind it, the libraries in Rust put its number in the text.
    """
    while error is not None:
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if number in STOPS:
            return number
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes whatever a library raises when the disk takes no more an OSError that names the file."""
    try:
        yield
    except Exception as error:
        number = reason(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def stops_cleanly(run_dir: Path) -> Iterator[None]:
    """Ends a run whose disk takes no more in one line that says where it goes on.

    Raises:
        RunFailed: What could not be written and why, the free space, the last checkpoint.
    """
    try:
        yield
    except (ConfigError, RunFailed):
        raise
    except Exception as error:
        number = reason(error)
        if number is None:
            raise
        named = error.filename if isinstance(error, OSError) else None
        what = named or f"{run_dir}, or the output of this command,"
        raise RunFailed(
            f"{what} could not be written: {os.strerror(number)}{_free(run_dir)}; {_kept(run_dir)}. "
            "Make room or mend the disk, then the same command goes on from there"
        ) from error


def _free(folder: Path) -> str:
    with suppress(OSError):
        disk = os.statvfs(folder)
        no_entries = ", no entry for another file" if disk.f_files and not disk.f_favail else ""
        return f" ({disk.f_bavail * disk.f_frsize / 1e6:,.1f} MB free{no_entries})"
    return ""


def _kept(run_dir: Path) -> str:
    last = max((path.name for path in (run_dir / "checkpoints").glob("step_*")), default=None)
    return f"step {int(last.removeprefix('step_'))} is saved" if last else "nothing was saved yet"
