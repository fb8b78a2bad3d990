"""A verifier that calls a user's own function: (completion, answer, problem) -> reward.

It runs in processes that can be killed, or in this one. A completion for which it fails (an exception, NaN,
something that is no number, too much time or memory) earns `failure_reward` and is counted; the first failure
is told in a warning.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Annotated, Any, Self

from capo_exp.config.build import REWARD, locate_reward
from capo_exp.config.declare import declares
from capo_exp.config.ranges import AT_LEAST_1, FINITE, POSITIVE
from capo_exp.grading.compare import Grade
from capo_exp.grading.pool import Failed, Item, Workers, name_error
from capo_exp.grading.verifier import Golds, Questions, RewardResult, Texts

REASONS = {
    "error": "reward/exceptions",
    "not_a_number": "reward/not_a_number",
    "timeout": "reward/timeouts",
    "crash": "reward/crashes",
}
"""Reason of a failure -> the metric that counts it."""
Outcome = float | Failed

SILENT_SECONDS = 60.0
"""How long a function may wait without CPU, with 20 times its limit on top."""


class FunctionVerifier:
    """Scores by a function that `reward.verifier.function` names: one completion a call, or all of a step if
    the function is marked with `@takes_lists`."""

    def __init__(
        self,
        *,
        function: str,
        correct_from: Annotated[float, FINITE],
        failure_reward: Annotated[float, FINITE],
        in_process: bool,
        timeout_seconds: Annotated[float, POSITIVE],
        workers: Annotated[int, AT_LEAST_1],
        memory_limit_gib: Annotated[float, POSITIVE],
    ) -> None:
        """Imports the function and starts nothing yet. The last three are the limits of Workers.

        Args:
            function: its dotted name, in a package that the command line allows.
            correct_from: reward from which on a completion counts as correct, in reward/accuracy and eval/.
            failure_reward: what a completion earns for which the function fails.
            in_process: call it in this process, where nothing can end it, and no limit holds.
            timeout_seconds: its cpu_seconds, for one call.
            workers: its count.
            memory_limit_gib: of each worker.

        Raises:
            ConfigError: there is no such function, or it takes other arguments.
        """
        self._name, self._told = function, False
        self._function = locate_reward(function, f"reward.verifier.{REWARD}")
        self._correct_from, self._failure_reward = correct_from, failure_reward
        limits = {"count": workers, "cpu_seconds": timeout_seconds, "memory_limit_gib": memory_limit_gib}
        warm_up = partial(import_module, self._function.__module__)
        pool = partial(Workers, **limits, warm_up=warm_up, silent_seconds=SILENT_SECONDS)
        self._workers = None if in_process else pool()

    def score(self, completions: Texts, golds: Golds, problems: Questions = None) -> RewardResult:
        """Scores as Verifier.score, by the first gold answer of each problem.

        Raises:
            GradingFailed: the workers cannot be started.
        """
        asked = zip(completions, golds, problems or [""] * len(golds), strict=True)
        pairs = [(text, gold, asks) for group, gold, asks in asked for text in group]
        items: list[Item] = [(text, next(iter(gold), ""), asks) for text, gold, asks in pairs]
        outcomes = iter(self._call_once(items) if self._takes_lists else self._call_each(items))
        found = [[next(outcomes) for _ in group] for group in completions]
        return self._to_result(found)

    @property
    def beside_sampling(self) -> bool:
        """Whether it runs in other processes, and does not see a whole step at once."""
        return self._workers is not None and not self._takes_lists

    @property
    def _takes_lists(self) -> bool:
        return bool(declares(self._function, "takes_lists"))

    def _call_each(self, items: list[Item]) -> list[Outcome]:
        distinct = list(dict.fromkeys(items))
        outcomes = self._run(partial(reward_one, self._function), distinct)
        return [outcomes[item] for item in items]

    def _call_once(self, items: list[Item]) -> list[Outcome]:
        if not items:
            return []
        whole = (tuple(items),)
        (outcome,) = self._run(partial(reward_all, self._function), [whole]).values()
        return [outcome] * len(items) if isinstance(outcome, Failed) else outcome

    def _run(self, function: Callable[..., Any], items: list[Item]) -> dict[Item, Any]:
        if self._workers is not None:
            return self._workers.run(function, items)
        return {item: _caught(function, item) for item in items}

    def _to_result(self, found: list[list[Outcome]]) -> RewardResult:
        failures = [each for row in found for each in row if isinstance(each, Failed)]
        if failures and not self._told:
            self._told = True
            first = min(failures, key=lambda each: each.reason != "error")  # an exception says most
            logging.getLogger(__name__).warning(
                "reward function %s failed for %d completions, which earn %g: %s",
                self._name, len(failures), self._failure_reward, first.detail or first.reason,
            )  # fmt: skip
        counts = Counter(each.reason for each in failures)
        metrics = {metric: float(counts[reason]) for reason, metric in REASONS.items()}
        metrics |= {"reward/no_answer_fraction": 0.0, "reward/gold_unparsable": 0.0}
        rewards = [[self._failure_reward if isinstance(e, Failed) else e for e in row] for row in found]
        return RewardResult(rewards, metrics, [list(map(self._grade, row)) for row in found])

    def _grade(self, outcome: Outcome) -> Grade:
        """Returns the verdict; no answer is extracted, so that maj@k has none to count."""
        if isinstance(outcome, Failed):
            return Grade(False, "", outcome.reason)
        correct = outcome >= self._correct_from
        return Grade(correct, "", "correct" if correct else "wrong")

    def gradable(self, golds: Golds) -> list[bool]:
        """Returns True for each: only the function knows what an answer has to be."""
        return [True] * len(golds)

    def close(self) -> None:
        """Kills the workers and waits for their end. The next score starts new ones."""
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reward_one(function: Callable[..., object], completion: str, answer: str, problem: str) -> Outcome:
    """Calls the function for one completion; runs in the worker."""
    return to_number(function(completion, answer, problem))


def reward_all(function: Callable[..., Any], items: Sequence[tuple[str, str, str]]) -> list[Outcome]:
    """Calls a function that takes lists; runs in the worker.

    Raises:
        ValueError: it returns another number of rewards.
    """
    rewards = list(function(*map(list, zip(*items, strict=True))))
    if len(rewards) != len(items):
        raise ValueError(f"{len(rewards)} rewards for {len(items)} completions")
    return list(map(to_number, rewards))


def to_number(value: object) -> Outcome:
    """Returns a reward as a float, or that it is none: NaN, infinite, or of another type."""
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, str | bytes) and math.isfinite(number := float(value)):  # pyright: ignore[reportArgumentType]
            return number
    return Failed("not_a_number", f"it returned {value!r}"[:200] + f" ({type(value).__name__})")


def _caught(function: Callable[..., Any], item: Item) -> Any:
    try:
        return function(*item)
    except (Exception, SystemExit) as failure:  # whatever a user's function raises
        return Failed("error", name_error(failure))
