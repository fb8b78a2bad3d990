"""(completion, answer) -> reward, 0 or 1. What can hang or crash runs in processes that can be killed.

Imports no torch, and math-verify only when it is needed, so that a verification worker starts in a second.
"""

import atexit
import logging
import multiprocessing
import resource
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol, Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from capo_exp.config import ConfigError
from capo_exp.grading import STYLES, Grade, exact_match, grade

__all__ = ["ExactVerifier", "Grade", "MathVerifier", "RewardResult", "Verifier", "exact_match", "grade"]

START_SECONDS = 60.0  # longest wait for a worker to start; then the pool counts as broken and is replaced
ORPHAN_SECONDS = 3.0  # a worker whose parent was killed ends itself this long after the limit of its answer
MAX_BROKEN_POOLS = 3  # in a row, without a single graded answer

Pair = tuple[str, str]


@dataclass(frozen=True)
class RewardResult:
    """Rewards of one rollout step."""

    rewards: list[list[float]]
    """[P][G], 0 or 1."""
    metrics: dict[str, float]
    """Counts of completions by what went wrong, and the fraction without an answer."""


class Verifier(Protocol):
    """What train.py and evaluate.py ask of a verifier."""

    def score(self, completions: list[list[str]], answers: list[str]) -> RewardResult:
        """P lists of G completions and P answers -> rewards [P][G]."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class ExactVerifier:
    """Scores with exact_match, in this process."""

    def score(self, completions: list[list[str]], answers: list[str]) -> RewardResult:
        """P lists of completions and P answers -> rewards [P][G]."""
        pairs = _unique_pairs(completions, answers)
        return _reward_result(completions, answers, {pair: exact_match(*pair) for pair in pairs})

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MathVerifier:
    """Scores with grade in worker processes, which start at the first score and live until close.

    An answer that outlives its limit or kills its worker earns 0 and is counted; the others are not affected.
    May be called from any thread. A script that uses it needs the `if __name__ == "__main__"` guard, because
    each worker imports the main module.
    """

    def __init__(
        self, timeout_seconds: float, workers: int, memory_limit_gib: float = 4.0, style: str = "auto"
    ) -> None:
        """Starts nothing yet.

        Args:
            timeout_seconds: limit for one answer, on the wall clock.
            workers: processes.
            memory_limit_gib: address space of each worker.
            style: see grade.

        Raises:
            ConfigError: a number that is not positive, or an unknown style.
        """
        numbers = {
            "timeout_seconds": timeout_seconds,
            "workers": workers,
            "memory_limit_gib": memory_limit_gib,
        }
        for key, value in numbers.items():
            if value <= 0:
                raise ConfigError(f"got reward.verifier.{key}={value}, expected a positive number")
        if style not in STYLES:
            raise ConfigError(f"got reward.verifier.style={style}, expected one of {', '.join(STYLES)}")
        self.grader: Callable[[str, str], Grade] = partial(grade, style=style)
        self._timeout_seconds = timeout_seconds
        self._workers = workers
        self._memory_limit_gib = memory_limit_gib
        self._pool: ProcessPool | None = None
        self._lock = Lock()

    def score(self, completions: list[list[str]], answers: list[str]) -> RewardResult:
        """P lists of completions and P answers -> rewards [P][G]. Equal pairs are graded once.

        Raises:
            RuntimeError: the workers cannot be started, or the verifier's pool broke several times in a row.
        """
        pending = _unique_pairs(completions, answers)
        grades: dict[Pair, Grade] = {}
        broken = 0
        with self._lock:
            while pending:
                graded = self._grade_until_broken(pending)
                grades |= graded
                pending = [pair for pair in pending if pair not in graded]
                broken = 0 if graded else broken + 1
                if broken == MAX_BROKEN_POOLS:
                    raise RuntimeError(
                        f"verification workers ended {broken} times without grading anything; got "
                        f"reward.verifier.memory_limit_gib={self._memory_limit_gib}, expected 1 or more"
                    )
        return _reward_result(completions, answers, grades)

    def _grade_until_broken(self, pairs: list[Pair]) -> dict[Pair, Grade]:
        """Grades of all pairs, or of those done before the pool broke; a broken pool is closed.

        Pebble calls the whole pool broken if a worker dies while none is known to be busy, and can lose a
        task whose worker is stopped as it takes it (noxdafox/pebble issue 153). Hence the wait with a limit:
        tasks are served in order, so the next verdict is at most a kill, a start and an answer away.
        """
        grades: dict[Pair, Grade] = {}
        try:
            futures = self._schedule(pairs)
            for pair, future in futures.items():
                if not wait([future], timeout=self._timeout_seconds + START_SECONDS).done:
                    raise BrokenExecutor(f"no verdict after {self._timeout_seconds + START_SECONDS} s")
                grades[pair] = _verdict(future)
        except BrokenExecutor as error:
            logging.getLogger(__name__).warning("verification pool replaced: %s", error)
            self.close()
        except KeyboardInterrupt:
            self.close()  # or the next score would wait for answers that nobody wants
            raise
        return grades

    def _schedule(self, pairs: list[Pair]) -> dict[Pair, ProcessFuture]:
        pool, limit = self._start(), self._timeout_seconds
        try:
            return {
                pair: pool.schedule(_grade_in_worker, (self.grader, *pair, limit), timeout=limit)
                for pair in pairs
            }
        except RuntimeError as error:  # the pool broke between two calls
            raise BrokenExecutor(str(error)) from error

    def _start(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._workers,
                initializer=_start_worker,
                initargs=(self._memory_limit_gib,),
                context=multiprocessing.get_context("spawn"),  # a fork would copy torch, its threads and CUDA
            )
            atexit.register(self.close)
        return self._pool

    def close(self) -> None:
        """Kills the workers and waits for their end. The next score starts new ones."""
        pool, self._pool = self._pool, None
        atexit.unregister(self.close)
        if pool is not None:
            pool.stop()
            pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _verdict(future: Future[Grade]) -> Grade:
    """Of a finished task.

    Raises:
        BrokenExecutor: it was not the answer that ended the task; it has to be graded again.
    """
    try:
        return future.result()
    except TimeoutError:
        return Grade(False, "", "timeout")
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGTERM:  # a scheduler that stops the job signals all of its processes
            raise BrokenExecutor("a worker got SIGTERM from outside") from error
        return Grade(False, "", "timeout" if error.exitcode == -signal.SIGALRM else "crash")
    except BrokenExecutor:
        raise
    except Exception:  # what the grader raised, MemoryError above all
        return Grade(False, "", "error")


def _start_worker(memory_limit_gib: float) -> None:
    """Runs once in each worker, before the clock of its first answer starts.

    Raises:
        RuntimeError: math-verify does not work here; without it every reward would silently be 0.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Pebble's handler is Python: it waits for C code to return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(memory_limit_gib * 2**30)
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not grade(r"\boxed{\frac{1}{2}}", "0.5").correct:  # also imports math-verify and builds its parser
        raise RuntimeError("math-verify cannot grade 1/2 = 0.5")


def _grade_in_worker(
    grader: Callable[[str, str], Grade], completion: str, answer: str, seconds: float
) -> Grade:
    """The parent enforces the limit; the alarm ends a worker whose parent was killed, in C code too."""
    signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_SECONDS)
    try:
        return grader(completion, answer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _unique_pairs(completions: list[list[str]], answers: list[str]) -> list[Pair]:
    """In order of first appearance."""
    return list(
        dict.fromkeys(
            (text, answer) for group, answer in zip(completions, answers, strict=True) for text in group
        )
    )


def _reward_result(
    completions: list[list[str]], answers: list[str], grades: dict[Pair, Grade]
) -> RewardResult:
    groups = [
        [grades[text, answer] for text in group] for group, answer in zip(completions, answers, strict=True)
    ]
    reasons = Counter(verdict.reason for group in groups for verdict in group)
    metrics = {
        "reward/timeouts": float(reasons["timeout"]),
        "reward/crashes": float(reasons["crash"] + reasons["error"]),
        "reward/no_answer_fraction": reasons["no_answer"] / max(1, reasons.total()),
        "reward/gold_unparsable": float(reasons["gold_unparsable"]),
    }
    return RewardResult([[float(verdict.correct) for verdict in group] for group in groups], metrics)
