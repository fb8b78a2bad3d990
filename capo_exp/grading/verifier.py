"""Verifiers: (completion, golds) -> reward and verdict. What can hang or crash runs in processes that can be
killed, and this file imports nothing slow, so that a worker starts in a second."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Annotated, Protocol, Self

from capo_exp.config.ranges import AT_LEAST_1, POSITIVE, Rule, one_of
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

Texts = list[list[str]]
"""[P][G] completions."""
Golds = list[tuple[str, ...]]
"""[P] gold answers, each in every way to write it."""
Questions = Sequence[str] | None
"""[P], where they are known; only a user's function looks at them."""
Pair = tuple[str, tuple[str, ...]]
"""A completion and its gold answer."""
REMEMBERED = 65_536  # verdicts; some 100 MB at most
LONGEST_ANSWER = 1_000  # characters of an extracted answer that is worth its memory
UNCERTAIN = ("timeout", "crash", "error")
"""These may be the machine's fault: such a completion is graded again."""
ENOUGH_GIB = Rule(
    lambda v: 0.25 <= v < math.inf, "a finite number of at least 0.25, for a parser of formulas"
)


@dataclass(frozen=True)
class RewardResult:
    """Rewards of one rollout step."""

    rewards: list[list[float]]
    """[P, G] 0 or 1, or what a user's function returns."""
    metrics: dict[str, float]
    """Counts completions by what went wrong, and has the fraction without an answer."""
    grades: list[list[Grade]]
    """[P, G] what the rewards were made from."""


def join_results(parts: Sequence[RewardResult]) -> RewardResult:
    """Puts the results of a step's parts behind each other, as if they were scored at once."""
    rewards = [row for part in parts for row in part.rewards]
    grades = [row for part in parts for row in part.grades]
    metrics = {key: sum(part.metrics[key] for part in parts) for key in parts[0].metrics}
    metrics["reward/no_answer_fraction"] = fmean(one.reason == "no_answer" for row in grades for one in row)
    return RewardResult(rewards, metrics, grades)


class Verifier(Protocol):
    """What training and evaluation ask of a verifier. One that scores in other processes, and each completion
    on its own, may say `beside_sampling = True`: parts of a step are then scored while others are sampled."""

    def score(self, completions: Texts, golds: Golds, problems: Questions = None) -> RewardResult:
        """Scores P lists of G completions by P gold answers."""
        ...

    def gradable(self, golds: Golds) -> list[bool]:
        """Returns which problems can be trained on; False = leave it out of the data."""
        ...

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class ExactVerifier:
    """Scores in this process by comparing texts: the last box, or what another `match` looks at."""

    def __init__(self, match: Callable[[str, str], Grade] = exact_match) -> None:
        self._match = match

    def score(self, completions: Texts, golds: Golds, problems: Questions = None) -> RewardResult:
        """Scores as Verifier.score."""
        grades = {
            (text, accepted): choose_best(self._match(text, gold) for gold in accepted)
            for text, accepted in _unique_pairs(completions, golds)
        }
        return _to_result(completions, golds, grades)

    def gradable(self, golds: Golds) -> list[bool]:
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
    Verdicts are remembered by content until close, but for those that may be the machine's fault.
    """

    beside_sampling = True

    def __init__(
        self,
        *,
        timeout_seconds: Annotated[float, POSITIVE],
        workers: Annotated[int, AT_LEAST_1],
        memory_limit_gib: Annotated[float, ENOUGH_GIB],
        style: Annotated[str, one_of(*STYLES)],
        unparsable_gold: Annotated[str, one_of("drop", "one")],
    ) -> None:
        """Starts nothing yet. The first three are the limits of Workers.

        Args:
            timeout_seconds: its cpu_seconds.
            workers: its count.
            memory_limit_gib: of each worker.
            style: see grade.
            unparsable_gold: what becomes of a problem whose gold answer cannot be read: drop = it leaves the
                data; one = every completion earns 1, as in the authors' program.
        """
        self.grader: Callable[[str, tuple[str, ...]], Grade] = partial(grade_any, style=style)
        self._unparsable_gold = unparsable_gold
        limits = {"count": workers, "cpu_seconds": timeout_seconds, "memory_limit_gib": memory_limit_gib}
        self._workers = Workers(**limits, warm_up=_check_math_verify)
        self._known: dict[bytes, Grade] = {}

    def score(self, completions: Texts, golds: Golds, problems: Questions = None) -> RewardResult:
        """Scores as Verifier.score; equal pairs are graded once.

        Raises:
            GradingFailed: the workers cannot be started.
        """
        keys = {pair: _digest(pair) for pair in _unique_pairs(completions, golds)}
        grades = {pair: self._known[key] for pair, key in keys.items() if key in self._known}
        pending = [pair for pair in keys if pair not in grades]
        for pair, outcome in self._workers.run(self.grader, pending).items():
            grades[pair] = Grade(False, "", outcome.reason) if isinstance(outcome, Failed) else outcome
        if len(self._known) + len(pending) > REMEMBERED:
            self._known.clear()
        for pair in pending:
            if grades[pair].reason not in UNCERTAIN and len(grades[pair].extracted) <= LONGEST_ANSWER:
                self._known[keys[pair]] = grades[pair]
        return _to_result(completions, golds, grades, 1.0 if self._unparsable_gold == "one" else 0.0)

    def gradable(self, golds: Golds) -> list[bool]:
        """Returns whether each gold answer can be read in any of its ways; with unparsable_gold=one always.

        Raises:
            GradingFailed: as score.
        """
        if self._unparsable_gold == "one":
            return [True] * len(golds)
        hard = {(gold,) for accepted in golds for gold in accepted if not is_plain_number(gold)}
        readable = self._workers.run(can_read_gold, sorted(hard))
        return [any(readable.get((gold,), True) is True for gold in accepted) for accepted in golds]

    def close(self) -> None:
        """Kills the workers, waits for their end and forgets all verdicts. The next score starts new ones."""
        self._workers.close()
        self._known.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_math_verify() -> None:
    """Imports math-verify and builds its parser, without which every reward would silently be 0."""
    if not grade(r"\boxed{2 + \sqrt{9} x}", "3x + 2").correct:
        raise RuntimeError("math-verify cannot grade 2 + 3x")


def _digest(pair: Pair) -> bytes:
    return hashlib.blake2b(repr(pair).encode(), digest_size=16).digest()


def _unique_pairs(completions: Texts, golds: Golds) -> list[Pair]:
    asked = zip(completions, golds, strict=True)
    return list(dict.fromkeys((text, accepted) for group, accepted in asked for text in group))


def _to_result(
    completions: Texts, golds: Golds, verdicts: dict[Pair, Grade], unread: float = 0.0
) -> RewardResult:
    """Puts verdicts in the completions' order; `unread` is the reward where no gold could be read."""
    asked = zip(completions, golds, strict=True)
    grades = [[verdicts[text, accepted] for text in group] for group, accepted in asked]
    reasons = Counter(verdict.reason for group in grades for verdict in group)
    metrics = {
        "reward/timeouts": float(reasons["timeout"]),
        "reward/crashes": float(reasons["crash"] + reasons["error"]),
        "reward/no_answer_fraction": reasons["no_answer"] / max(1, reasons.total()),
        "reward/gold_unparsable": float(reasons["gold_unparsable"]),
    }
    rewards = [
        [unread if one.reason == "gold_unparsable" else float(one.correct) for one in group]
        for group in grades
    ]
    return RewardResult(rewards, metrics, grades)
