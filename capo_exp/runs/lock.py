"""The lock of a folder: one process at a time has it, and its end frees it, however it came. No torch."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capo_exp.config.errors import ConfigError

_held: set[int] = set()


def _forget_in_child() -> None:
    # A forked worker shares the lock and would keep it after a kill of its parent.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class InProgress(ConfigError):
    """Another process has the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; the operating system frees it even after SIGKILL.

    Raises:
        ConfigError: the folder cannot be written, or, as InProgress, another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        expected = "expected output_dir, or output of evaluate, to be a directory that can be written"
        raise ConfigError(f"{folder}: {error.strerror}; {expected}") from None
    try:
        try:
            _acquire(descriptor, folder)
        except OSError as error:
            wanted = "expected output_dir on a file system with locks, such as a local disk"
            raise ConfigError(f"{folder}: it cannot be locked ({error.strerror}); {wanted}") from None
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    for _ in range(5):  # is_locked of a status command holds the lock for an instant
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return
        time.sleep(0.1)
    pid = os.pread(descriptor, 20, 0).decode() or "unknown"
    raise InProgress(f"run {folder} is in progress in another process (pid {pid}); wait for it or stop it")


def is_locked(folder: Path) -> bool:
    """Returns whether a process is inside `locked` for this folder."""
    try:
        with open(os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or not ours to open
        return False
    return False
