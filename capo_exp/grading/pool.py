"""Runs a function over many items in processes that can be killed: what hangs, crashes or takes too much
memory costs one item. Imports nothing slow, so that a worker starts in a second."""

import atexit
import logging
import multiprocessing
import resource
import signal
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import BrokenExecutor, Future, wait
from dataclasses import dataclass
from threading import Lock
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

START_SECONDS = 60.0  # longest wait for a worker to start; then the pool counts as broken and is replaced
ORPHAN_SECONDS = 3.0  # a worker whose parent was killed ends itself this long after the limit of its item
BATCH_SECONDS = 1.0  # limit of an item in a batch; the items of a batch that fails run again, one by one
MAX_BROKEN_POOLS = 3  # in a row, without a single result

Task = tuple[Hashable, ...]
"""Items that one message carries to a worker."""


@dataclass(frozen=True)
class Failed:
    """What an item has in place of a result."""

    reason: str
    """error | timeout | crash."""


class Workers:
    """Processes that start at the first run and live until close. May be called from any thread.

    A script that uses it needs the `if __name__ == "__main__"` guard, because each worker imports the main
    module.
    """

    def __init__(
        self, *, count: int, timeout_seconds: float, memory_limit_gib: float, warm_up: Callable[[], None]
    ) -> None:
        """Starts nothing yet.

        Args:
            count: number of processes.
            timeout_seconds: limit for one item, on the wall clock.
            memory_limit_gib: address space of each worker.
            warm_up: runs once in each worker, before the clock of its first item starts.
        """
        self._count = count
        self._timeout_seconds = timeout_seconds
        self._memory_limit_gib = memory_limit_gib
        self._warm_up = warm_up
        self._pool: ProcessPool | None = None
        self._lock = Lock()

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Hashable], *, batch: int
    ) -> dict[Hashable, Any]:
        """Returns item -> function(item), or Failed, for items that differ from each other.

        Args:
            function: can be pickled.
            items: the function's arguments.
            batch: items a message; more than 1 pays where an item takes about as long as its message.

        Raises:
            RuntimeError: the workers cannot be started, or the pool broke several times in a row.
        """
        tasks = [tuple(items[start : start + batch]) for start in range(0, len(items), batch)]
        results: dict[Hashable, Any] = {}
        broken = 0
        with self._lock:
            while tasks:
                done, left = self._until_broken(function, tasks)
                results |= done
                broken = broken + 1 if left == tasks else 0
                tasks = left
                if broken == MAX_BROKEN_POOLS:
                    raise RuntimeError(
                        f"verification workers ended {broken} times without grading anything; got "
                        f"reward.verifier.memory_limit_gib={self._memory_limit_gib}, expected 1 or more"
                    )
        return results

    def _until_broken(
        self, function: Callable[[Any], Any], tasks: list[Task]
    ) -> tuple[dict[Hashable, Any], list[Task]]:
        """Returns results and the tasks still to do; closes a pool that broke.

        Pebble calls the whole pool broken if a worker dies while none is known to be busy, and can lose a
        task whose worker is stopped as it takes it (noxdafox/pebble issue 153). Hence the wait with a limit:
        tasks are served in order, so the next result is at most a kill, a start and a task away.
        """
        results: dict[Hashable, Any] = {}
        left: list[Task] = []
        done = 0
        try:
            for task, future in zip(tasks, self._schedule(function, tasks), strict=True):
                patience = self._limit(task) * len(task) + ORPHAN_SECONDS + START_SECONDS
                if not wait([future], timeout=patience).done:
                    raise BrokenExecutor(f"no result after {patience} s")
                found = _outcome(future)
                if not isinstance(found, Failed):
                    results |= zip(task, found, strict=True)
                elif len(task) == 1:
                    results[task[0]] = found
                else:
                    left += [(item,) for item in task]
                done += 1
        except BrokenExecutor as error:
            logging.getLogger(__name__).warning("verification pool replaced: %s", error)
            self.close()
        except KeyboardInterrupt:
            self.close()  # or the next run would wait for results that nobody wants
            raise
        return results, left + tasks[done:]

    def _limit(self, task: Task) -> float:
        """Returns the seconds for each item of a task."""
        return self._timeout_seconds if len(task) == 1 else min(self._timeout_seconds, BATCH_SECONDS)

    def _schedule(self, function: Callable[[Any], Any], tasks: list[Task]) -> list[ProcessFuture]:
        """Hands out the tasks. Pebble ends a single item, at its limit; its worker one of a batch, since it
        knows when the item began."""
        pool, futures = self._start(), []
        try:
            for task in tasks:
                limit = self._limit(task)
                single = len(task) == 1
                alarm, timeout = (
                    (limit + ORPHAN_SECONDS, limit) if single else (limit, limit * len(task) + ORPHAN_SECONDS)
                )
                futures.append(pool.schedule(_in_worker, (function, task, alarm), timeout=timeout))
        except RuntimeError as error:  # the pool broke between two calls
            raise BrokenExecutor(str(error)) from error
        return futures

    def _start(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._count,
                initializer=_start_worker,
                initargs=(self._memory_limit_gib, self._warm_up),
                context=multiprocessing.get_context("spawn"),  # a fork would copy torch, its threads and CUDA
            )
            atexit.register(self.close)
        return self._pool

    def close(self) -> None:
        """Kills the workers and waits for their end. The next run starts new ones."""
        pool, self._pool = self._pool, None
        atexit.unregister(self.close)
        if pool is not None:
            pool.stop()
            pool.join()


def _outcome(future: Future[list[Any]]) -> list[Any] | Failed:
    """Returns what became of a finished task.

    Raises:
        BrokenExecutor: it was not the items that ended the task; they have to run again.
    """
    try:
        return future.result()
    except TimeoutError:
        return Failed("timeout")
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGTERM:  # a scheduler that stops the job signals all of its processes
            raise BrokenExecutor("a worker got SIGTERM from outside") from error
        return Failed("timeout" if error.exitcode == -signal.SIGALRM else "crash")
    except BrokenExecutor:
        raise
    except Exception:  # what cannot be sent, and a MemoryError outside the function
        return Failed("error")


def _start_worker(memory_limit_gib: float, warm_up: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Pebble's handler is Python: it waits for C code to return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the run ends its workers, not its terminal
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(memory_limit_gib * 2**30)
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warm_up()


def _in_worker(function: Callable[[Any], Any], task: Task, seconds: float) -> list[Any]:
    """Returns the results of the items; the alarm ends the process, in C code too and without its parent."""
    return [_with_alarm(function, item, seconds) for item in task]


def _with_alarm(function: Callable[[Any], Any], item: Hashable, seconds: float) -> Any:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(item)
    except Exception:  # MemoryError above all
        return Failed("error")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
