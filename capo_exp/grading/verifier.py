"""(completion, golds) -> reward and verdict. What can hang or crash runs in processes that can be killed.

Imports no torch, and math-verify only when it is needed, so that a verification worker starts in a second.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

from capo_exp.config.errors import ConfigError
from capo_exp.grading.cache import Pair, VerdictCache
from capo_exp.grading.compare import (
    STYLES,
    Grade,
    best,
    exact_match,
    grade,
    grade_any,
    plainly_readable,
    readable_gold,
)
from capo_exp.grading.pool import Failed, Workers

__all__ = ["ExactVerifier", "Grade", "MathVerifier", "RewardResult", "Verifier", "exact_match", "grade"]

POLICIES = ("drop", "one")
GOLDS_A_MESSAGE = 64
CACHED_ANSWERS = 65_536


@dataclass(frozen=True)
class RewardResult:
    """Rewards of one rollout step."""

    rewards: list[list[float]]
    """[P][G], 0 or 1."""
    metrics: dict[str, float]
    """Counts of completions by what went wrong, and the fraction without an answer."""
    grades: list[list[Grade]]
    """[P][G], what the rewards were made from."""


class Verifier(Protocol):
    """What train.py and evaluate.py ask of a verifier."""

    def score(self, completions: list[list[str]], golds: list[tuple[str, ...]]) -> RewardResult:
        """P lists of G completions and P gold answers, each in every way to write it -> rewards [P][G]."""
        ...

    def gradable(self, golds: list[tuple[str, ...]]) -> list[bool]:
        """Which problems can be trained on; False = leave it out of the data."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class ExactVerifier:
    """Scores with exact_match, in this process."""

    def score(self, completions: list[list[str]], golds: list[tuple[str, ...]]) -> RewardResult:
        """P lists of completions and P gold answers -> rewards [P][G]."""
        grades = {
            (text, accepted): best(exact_match(text, gold) for gold in accepted)
            for text, accepted in _unique_pairs(completions, golds)
        }
        return _reward_result(completions, golds, grades, unparsable=0.0)

    def gradable(self, golds: list[tuple[str, ...]]) -> list[bool]:
        """Whether there is any text in the gold answer."""
        return [any(gold.strip() for gold in accepted) for accepted in golds]

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MathVerifier:
    """Scores with grade_any in worker processes; see Workers for how they start and end.

    An answer that outlives its limit or kills its worker earns 0 and is counted; the others are not affected.
    Verdicts are remembered by content until close, CACHED_ANSWERS of them; not those of time-outs, crashes
    and errors, which may be the machine's fault: the same answer is tried again the next time.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float,
        workers: int,
        memory_limit_gib: float = 4.0,
        style: str = "auto",
        unparsable_gold: str = "drop",
    ) -> None:
        """Starts nothing yet.

        Args:
            timeout_seconds: limit for one answer, on the wall clock.
            workers: processes.
            memory_limit_gib: address space of each worker.
            style: see grade.
            unparsable_gold: what to do with a problem whose gold answer cannot be read: drop = leave it out
                of the data; one = every completion earns 1, as in the authors' program.

        Raises:
            ConfigError: a number that is not positive, or an unknown style or policy.
        """
        numbers = {
            "timeout_seconds": timeout_seconds,
            "workers": workers,
            "memory_limit_gib": memory_limit_gib,
        }
        for key, value in numbers.items():
            if value <= 0:
                raise ConfigError(f"got reward.verifier.{key}={value}, expected a positive number")
        for key, value, known in (
            ("style", style, STYLES),
            ("unparsable_gold", unparsable_gold, POLICIES),
        ):
            if value not in known:
                raise ConfigError(f"got reward.verifier.{key}={value}, expected one of {', '.join(known)}")
        self.grader: Callable[[str, tuple[str, ...]], Grade] = partial(grade_any, style=style)
        self._unparsable_gold = unparsable_gold
        self._workers = Workers(
            count=workers,
            timeout_seconds=timeout_seconds,
            memory_limit_gib=memory_limit_gib,
            warm_up=_check_math_verify,
        )
        self._cache = VerdictCache(CACHED_ANSWERS)

    def score(self, completions: list[list[str]], golds: list[tuple[str, ...]]) -> RewardResult:
        """P lists of completions and P gold answers -> rewards [P][G]. Equal pairs are graded once.

        Raises:
            RuntimeError: the workers cannot be started, or the verifier's pool broke several times in a row.
        """
        pairs = _unique_pairs(completions, golds)
        grades = self._cache.find(pairs)
        pending = [pair for pair in pairs if pair not in grades]
        outcomes = self._workers.run(partial(_grade_pair, self.grader), pending, batch=1)
        graded = {pair: _as_grade(outcomes[pair]) for pair in pending}
        self._cache.add(graded)
        unparsable = 1.0 if self._unparsable_gold == "one" else 0.0
        return _reward_result(completions, golds, grades | graded, unparsable=unparsable)

    def gradable(self, golds: list[tuple[str, ...]]) -> list[bool]:
        """Whether the gold answer can be read in any of its ways; with unparsable_gold=one always.

        Raises:
            RuntimeError: as score.
        """
        if self._unparsable_gold == "one":
            return [True] * len(golds)
        every = list(dict.fromkeys(gold for accepted in golds for gold in accepted))
        hard = [gold for gold in every if not plainly_readable(gold)]
        readable = self._workers.run(readable_gold, hard, batch=GOLDS_A_MESSAGE)
        return [any(readable.get(gold, True) is True for gold in accepted) for accepted in golds]

    def close(self) -> None:
        """Kills the workers, waits for their end and forgets all verdicts. The next score starts new ones."""
        self._workers.close()
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_math_verify() -> None:
    """Imports math-verify and builds its parser.

    Raises:
        RuntimeError: math-verify does not work here; without it every reward would silently be 0.
    """
    if not grade(r"\boxed{\frac{1}{2}}", "0.5").correct:
        raise RuntimeError("math-verify cannot grade 1/2 = 0.5")


def _grade_pair(grader: Callable[[str, tuple[str, ...]], Grade], pair: Pair) -> Grade:
    return grader(*pair)


def _as_grade(outcome: Grade | Failed) -> Grade:
    return Grade(False, "", outcome.reason) if isinstance(outcome, Failed) else outcome


def _unique_pairs(completions: list[list[str]], golds: list[tuple[str, ...]]) -> list[Pair]:
    """In order of first appearance."""
    return list(
        dict.fromkeys(
            (text, accepted) for group, accepted in zip(completions, golds, strict=True) for text in group
        )
    )


def _reward_result(
    completions: list[list[str]],
    golds: list[tuple[str, ...]],
    verdicts: dict[Pair, Grade],
    *,
    unparsable: float,
) -> RewardResult:
    """`unparsable` is the reward where the gold answer could not be read."""
    grades = [
        [verdicts[text, accepted] for text in group]
        for group, accepted in zip(completions, golds, strict=True)
    ]
    reasons = Counter(verdict.reason for group in grades for verdict in group)
    metrics = {
        "reward/timeouts": float(reasons["timeout"]),
        "reward/crashes": float(reasons["crash"] + reasons["error"]),
        "reward/no_answer_fraction": reasons["no_answer"] / max(1, reasons.total()),
        "reward/gold_unparsable": float(reasons["gold_unparsable"]),
    }
    rewards = [
        [unparsable if verdict.reason == "gold_unparsable" else float(verdict.correct) for verdict in group]
        for group in grades
    ]
    return RewardResult(rewards, metrics, grades)
