"""How processes end each other: a signal lets the step end and be saved; children end with their parent."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PR_SET_PDEATHSIG = 1
ONE_PRESS = 1.0
"""Seconds in which signals count as one: a terminal or Slurm and the parent may both send it."""

Handler = Callable[[int, object], None]


@contextmanager
def stop_signal(message: Callable[[str], None]) -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C, SIGTERM or SIGHUP sets, which `message` tells the user; a second one raises
    KeyboardInterrupt at once."""
    stopped = threading.Event()
    first = 0.0

    def handle(*_: object) -> None:
        nonlocal first
        if stopped.is_set() and time.monotonic() - first > ONE_PRESS:
            raise KeyboardInterrupt
        if not stopped.is_set():
            first = time.monotonic()
            stopped.set()
            with suppress(Exception):  # in the middle of a line the console may raise anything
                message(
                    "stopping after this step; once more stops now and loses what came after the last "
                    "checkpoint"
                )

    with _handled_by(handle):
        yield stopped


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP do what Ctrl-C does, so that whoever has started something closes it."""

    def handle(*_: object) -> None:
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextmanager
def forwarded_to(child: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Sends Ctrl-C, SIGTERM and SIGHUP on to a child, which decides how to end; the event is set then."""
    stopped = threading.Event()

    def handle(number: int, _: object) -> None:
        stopped.set()
        child.send_signal(number)

    with _handled_by(handle):
        yield stopped


@contextmanager
def _handled_by(handle: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def hang_up(number: int, frame: object) -> None:
        with open(os.devnull, "wb") as nowhere:  # the terminal is gone: whoever writes to it would fail
            for descriptor in terminals:
                os.dup2(nowhere.fileno(), descriptor)
        handle(number, frame)

    handlers: dict[int, Handler] = {signal.SIGINT: handle, signal.SIGTERM: handle}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has asked to go on without a terminal
        handlers[signal.SIGHUP] = hang_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """For preexec_fn: Linux ends the new process, by SIGTERM, when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
