"""Files that are whole or not there, and what is said when the disk takes no more. Imports no torch."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from capo_exp.config.errors import ConfigError, RunFailed, same_command

STOPS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM,
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip
"""A disk is full, over the quota, beyond the largest file allowed, read-only, broken, gone (a network's); a
file or folder may not be written (permissions, an immutable file), or stands where the other belongs."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read; no pipe or device, which a stranger's directory may have, and which has no end.

    Raises:
        OSError: it is one, or cannot be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        yield file


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write; on success it is on disk and takes the place of `path` in one go."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with name_disk_error(path):
            partial.unlink(missing_ok=True)  # a stranger's link there would be written through
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with suppress(OSError):  # such as of a disk that is read-only now
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whatever kills the process."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, fields: Any) -> None:
    """Writes JSON for people to read, the whole of it or nothing."""
    write_atomic(path, json.dumps(fields, indent=2) + "\n")


def keep_id(path: Path, new: str) -> str:
    """Returns the id in a file; one that is absent, or empty after a kill or a full disk, gets the new id."""
    with suppress(FileNotFoundError), open_regular(path) as file:
        if kept := file.read().decode():
            return kept
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, new)
    return new


def append_line(file: FileIO, line: str) -> None:
    """Appends a line to a file, the whole of it or nothing; raises an OSError that names the file."""
    data, end = line.encode(), file.seek(0, os.SEEK_END)
    try:
        with name_disk_error(Path(str(file.name))):
            while data:
                data = data[file.write(data) :]
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Returns step -> checkpoints/step_<step>, the oldest first, whole or not; other names are not ours."""
    folders = (path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())
    steps = {int(path.name[5:]): path for path in folders if re.fullmatch("[0-9]{6,}", path.name[5:])}
    return dict(sorted(steps.items()))


def find_disk_error(error: BaseException | None) -> int | None:
    """Returns the number in STOPS of an error or of one that it came from; None if it is about another thing.

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
def name_disk_error(path: Path) -> Iterator[None]:
    """Makes whatever a library raises when the disk takes no more an OSError that names the file."""
    try:
        yield
    except Exception as error:
        number = find_disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def stop_on_disk_error(run_dir: Path, overwrite: bool = False) -> Iterator[None]:
    """Ends a run whose disk takes no more in one line that says where it goes on.

    Raises:
        RunFailed: The message says what could not be written and why, the free space, the last checkpoint.
    """
    try:
        yield
    except (ConfigError, RunFailed):
        raise
    except Exception as error:
        number = find_disk_error(error)
        if number is None:
            raise
        named = error.filename if isinstance(error, OSError) else None
        what = named or f"{run_dir}, or the output of this command,"
        raise RunFailed(
            f"{what} could not be written: {os.strerror(number)}{_state(run_dir)}. "
            "Make room, or mend the disk or its permissions; "
            f"then {same_command(overwrite)} goes on from there"
        ) from error


def _state(run_dir: Path) -> str:
    """Returns such as ` (0.0 MB free); step 8 is saved`, as far as the disk says."""
    free, saved = "", dict[int, Path]()
    with suppress(OSError):
        disk = os.statvfs(run_dir)
        no_entries = ", no entry for another file" if disk.f_files and not disk.f_favail else ""
        free = f" ({disk.f_bavail * disk.f_frsize / 1e6:,.1f} MB free{no_entries})"
        saved = list_checkpoints(run_dir)
    return f"{free}; " + (f"step {max(saved)} is saved" if saved else "nothing was saved yet")
