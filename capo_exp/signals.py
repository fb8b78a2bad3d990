"""Stopping a run with a signal, so that the step can end and be saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signal(message: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal raises KeyboardInterrupt at once.

    Args:
        message: says to the user what a signal has done.
    """
    stopped = threading.Event()

    def handle(number: int, frame: object) -> None:
        del number, frame
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        message("stopping after this step; once more stops now and loses what came after the last checkpoint")

    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield stopped
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
