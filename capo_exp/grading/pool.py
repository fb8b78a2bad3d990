"""Runs a function over many items in processes that can be killed: what hangs, crashes or takes too much
memory costs one item. Imports nothing slow, so that a worker starts in a second."""

import logging
import multiprocessing
import resource
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Lock
from typing import Any

from capo_exp.config.errors import RunFailed

SILENT_SECONDS = 600.0
MAX_ENDS = 3  # times that a worker may be ended from outside, at its start or at one item
OUTSIDE = (-signal.SIGTERM, -signal.SIGKILL)  # a scheduler, or the kernel when the machine has no memory left

Item = tuple[Any, ...]
"""Arguments of one call."""


class GradingFailed(RunFailed):
    """The verifier's workers cannot start, which is no fault of an answer."""


@dataclass(frozen=True)
class Failed:
    """What an item has in place of a result."""

    reason: str
    """error | timeout | crash."""
    detail: str = ""
    """The exception of an error, in one line."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    items: deque[Item] = field(default_factory=deque)
    """What it was given and has not answered."""
    ready: bool = False


class Workers:
    """Processes that start at the first run and live until close. May be called from any thread.

    A script that uses it needs the `if __name__ == "__main__"` guard, because each worker imports the main
    module.
    """

    def __init__(
        self,
        *,
        count: int,
        cpu_seconds: float,
        memory_limit_gib: float,
        warm_up: Callable[[], object],
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        """Starts nothing yet.

        Args:
            count: number of processes.
            cpu_seconds: limit for one item, in its worker's CPU seconds: a busy machine is not its fault.
            memory_limit_gib: address space of each worker.
            warm_up: runs once in each worker, before its first item.
            silent_seconds: with 20 times cpu_seconds on top, how long all workers may say nothing, as where
                what they call waits without CPU. Then they are ended, and the item of each has failed.
        """
        self._count = count
        self._silent_seconds = silent_seconds + 20 * cpu_seconds
        self._limits = (cpu_seconds, memory_limit_gib)
        self._warm_up = warm_up
        self._workers: list[_Worker] = []
        self._ends: Counter[Any] = Counter()
        self._lock = Lock()

    def run(self, function: Callable[..., Any], items: Sequence[Item]) -> dict[Any, Any]:
        """Returns item -> function(*item), or Failed, for items that differ from each other.

        Raises:
            GradingFailed: the workers cannot be started, or `close` was called meanwhile.
        """
        results: dict[Any, Any] = {}
        waiting = deque(items)
        with self._lock:
            self._ends.clear()
            try:
                own = self._workers  # close, from another thread, puts another list in its place
                while len(results) < len(items):
                    self._hand_out(function, waiting)
                    self._listen(results, waiting)
                    if self._workers is not own:
                        raise GradingFailed("verification was closed while it graded")
            except BaseException:
                self.close()  # or the next run would get results that nobody wants
                raise
        return results

    def _hand_out(self, function: Callable[..., Any], waiting: deque[Item]) -> None:
        """Starts workers, and gives those that are idle some items: more than one where there are many."""
        busy = sum(bool(worker.items) for worker in self._workers)
        while len(self._workers) < min(self._count, busy + len(waiting)):
            self._workers.append(self._start())
        for worker in self._workers:
            if worker.ready and not worker.items and waiting:
                size = min(64, max(1, len(waiting) // (4 * self._count)))
                worker.items.extend(waiting.popleft() for _ in range(size))
                try:
                    worker.pipe.send((function, list(worker.items)))
                except OSError:
                    continue  # it has ended; _listen sees it

    def _listen(self, results: dict[Any, Any], waiting: deque[Item]) -> None:
        """Takes what the workers say, and what those that ended leave."""
        told = wait([worker.pipe for worker in self._workers], self._silent_seconds)
        if not told:
            text = "verification workers said nothing for %g s; they are ended, and what they do has failed"
            logging.getLogger(__name__).warning(text, self._silent_seconds)
        for worker in list(self._workers):
            if not told:
                worker.process.kill()
                self._bury(worker, results, waiting, silent=True)  # what it has forked may hold its pipe open
            if worker.pipe not in told:
                continue
            try:
                said = worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(worker, results, waiting, silent=False)
                continue
            if worker.ready:
                results[worker.items.popleft()] = said
            elif said is not None:
                raise GradingFailed(self._explain(said))
            worker.ready = True

    def _bury(self, worker: _Worker, results: dict[Any, Any], waiting: deque[Item], *, silent: bool) -> None:
        """Removes a worker that ended. Its item has failed, unless it was ended from outside."""
        self._workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        item = worker.items[0] if worker.items else None
        self._ends[item if worker.ready else "start"] += 1
        if self._ends["start"] >= MAX_ENDS:
            raise GradingFailed(self._explain(f"exit status {code}, {MAX_ENDS} times"))
        outside = code in OUTSIDE and not silent
        if outside:
            logging.getLogger(__name__).warning("a verification worker was ended from outside (%s)", code)
        if worker.items and (not outside or self._ends[item] >= MAX_ENDS):
            over = silent or code == -signal.SIGPROF
            results[worker.items.popleft()] = Failed("timeout" if over else "crash")
        waiting.extendleft(reversed(worker.items))

    def _explain(self, cause: str) -> str:
        memory = self._limits[1]
        key = f"reward.verifier.memory_limit_gib={memory}, expected 1 or more; " if memory < 1 else ""
        return f"verification workers end before they are ready: {key}{cause}"

    def _start(self) -> _Worker:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy torch, its threads and CUDA
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, *self._limits, self._warm_up), daemon=True)
        try:
            process.start()
        except OSError as error:
            raise GradingFailed(self._explain(str(error))) from error
        theirs.close()
        return _Worker(process, ours)

    def close(self) -> None:
        """Kills the workers and waits for their end. The next run starts new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


def _serve(
    pipe: Connection, cpu_seconds: float, memory_limit_gib: float, warm_up: Callable[[], object]
) -> None:
    """Answers items until the parent is gone. Says None when it is ready, else why it cannot be."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent's, who ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in C code too
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(memory_limit_gib * 2**30)
    try:
        resource.setrlimit(
            resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warm_up()
    except Exception as error:  # whatever a library makes of too little memory
        pipe.send(name_error(error))
        return
    pipe.send(None)
    while True:
        try:
            function, items = pipe.recv()
        except EOFError:
            return
        for item in items:
            pipe.send(_limited(function, item, cpu_seconds))


def name_error(error: BaseException) -> str:
    """Returns an exception in one line."""
    text = ""
    with suppress(Exception):  # a user's exception may have no text either
        text = str(error)
    return f"{type(error).__name__}: {text}".partition("\n")[0].strip(": ")[:200]


def _limited(function: Callable[..., Any], item: Item, cpu_seconds: float) -> Any:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return function(*item)
    except Exception as error:  # MemoryError above all
        return Failed("error", name_error(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
