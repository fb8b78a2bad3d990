"""Verifiers: (completion, golds) -> reward and verdict. What can hang or crash runs in processes that can be
killed, and this file imports nothing slow, so that a worker starts in a second.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Protocol, Self

from capo_exp.config.ranges import AT_LEAST_1, POSITIVE, one_of
from capo_exp.grading.cache import Pair, VerdictCache
from capo_exp.grading.compare import (
    STYLES,
    Grade,
    can_read_gold,
    choose_best,
    exact_match,
    grade,
    grade_any,
    is_plain_number,
    last_number_match,
)
from capo_exp.grading.pool import Failed, Workers

GOLDS_A_MESSAGE = 64
CACHED_ANSWERS = 65_536


@dataclass(frozen=True)
class RewardResult:
    """Rewards of one rollout step."""

    rewards: list[list[float]]
    """[P][G], 0 or 1."""
    metrics: dict[str, float]
    """Counts completions by what went wrong, and has the fraction without an answer."""
    grades: list[list[Grade]]
    """[P][G], what the rewards were made from."""


class Verifier(Protocol):
    """What training and evaluation ask of a verifier."""

    def score(self, completions: list[list[str]], golds: list[tuple[str, ...]]) -> RewardResult:
        """Scores P lists of G completions by P gold answers, each in every way to write it."""
        ...

    def gradable(self, golds: list[tuple[str, ...]]) -> list[bool]:
        """Returns which problems can be trained on; False = leave it out of the data."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class ExactVerifier:
    """Scores in this process by comparing texts: the last box, or what another `match` looks at."""

    def __init__(self, match: Callable[[str, str], Grade] = exact_match) -> None:
        self._match = match

    def score(self, completions: list[list[str]], golds: list[tuple[str, ...]]) -> RewardResult:
        """Scores as Verifier.score."""
        grades = {
            (text, accepted): choose_best(self._match(text, gold) for gold in accepted)
            for text, accepted in _unique_pairs(completions, golds)
        }
        return _to_result(completions, golds, grades, unparsable=0.0)

    def gradable(self, golds: list[tuple[str, ...]]) -> list[bool]:
        """Returns whether there is any text in each gold answer."""
        return [any(gold.strip() for gold in accepted) for accepted in golds]

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def last_number() -> ExactVerifier:
    """Makes the verifier that compares the last number of a completion with the answer."""
    return ExactVerifier(last_number_match)


class MathVerifier:
    """Scores with grade_any in worker processes; see Workers for how they start and end.

    An answer that outlives its limit or kills its worker earns 0 and is counted; the others are not affected.
    Verdicts are remembered by content until close, CACHED_ANSWERS of them; not those of time-outs, crashes
    and errors, which may be the machine's fault: the same answer is tried again the next time.
    """

    def __init__(
        self,
        *,
        timeout_seconds: Annotated[float, POSITIVE],
        workers: Annotated[int, AT_LEAST_1],
        memory_limit_gib: Annotated[float, POSITIVE],
        style: Annotated[str, one_of(*STYLES)],
        unparsable_gold: Annotated[str, one_of("drop", "one")],
    ) -> None:
        """Starts nothing yet.

        Args:
            timeout_seconds: limit for one answer, on the wall clock.
            workers: number of processes.
            memory_limit_gib: address space of each worker.
            style: see grade.
            unparsable_gold: what becomes of a problem whose gold answer cannot be read: drop = it leaves the
                data; one = every completion earns 1, as in the authors' program.
        """
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
        """Scores as Verifier.score; equal pairs are graded once.

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
        return _to_result(completions, golds, grades | graded, unparsable=unparsable)

    def gradable(self, golds: list[tuple[str, ...]]) -> list[bool]:
        """Returns whether each gold answer can be read in any of its ways; with unparsable_gold=one always.

        Raises:
            RuntimeError: as score.
        """
        if self._unparsable_gold == "one":
            return [True] * len(golds)
        every = list(dict.fromkeys(gold for accepted in golds for gold in accepted))
        hard = [gold for gold in every if not is_plain_number(gold)]
        readable = self._workers.run(can_read_gold, hard, batch=GOLDS_A_MESSAGE)
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
    """Returns each pair once, in order of first appearance."""
    asked = zip(completions, golds, strict=True)
    return list(dict.fromkeys((text, accepted) for group, accepted in asked for text in group))


def _to_result(
    completions: list[list[str]],
    golds: list[tuple[str, ...]],
    verdicts: dict[Pair, Grade],
    *,
    unparsable: float,
) -> RewardResult:
    """Puts verdicts in the completions' order; `unparsable` is the reward where no gold could be read."""
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
