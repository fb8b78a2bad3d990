"""A user's reward function: what it returns, raises or does to its worker is a reward, counted and named."""

import logging

import pytest

from capo_exp.config.errors import ConfigError
from capo_exp.grading.function import FunctionVerifier

FUNCTIONS = """
import math
import os
from decimal import Decimal
import numpy as np
from capo_exp import takes_lists
def obey(completion, answer, problem):
    if completion == "raise":
        raise KeyError(problem)
    if completion == "loop":
        while True:
            pass
    if completion == "exit":
        os._exit(3)
    known = {"nan": math.nan, "text": "1", "none": None, "same": True, "numpy": np.bool_(True)}
    known["decimal"] = Decimal("0.5")
    return known[completion] if completion in known else len(completion) / len(answer)
@takes_lists
def rank(completions, answers, problems):
    order = sorted(completions)
    return [order.index(text) + 10 * (problem == "q") for text, problem in zip(completions, problems)]
@takes_lists
def too_few(completions, answers, problems):
    return [1.0]
def two(completion, answer): ...
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the verifier of a function above, in this process unless a test says otherwise."""
    (tmp_path / "odd_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CAPO_EXP_PLUGINS", "odd_rewards")
    made: list[FunctionVerifier] = []

    def verifier(name, **changes):
        numbers = {"correct_from": 0.5, "failure_reward": -1.0, "in_process": True}
        limits = {"timeout_seconds": 0.5, "workers": 1, "memory_limit_gib": 4.0}
        made.append(FunctionVerifier(function=f"odd_rewards.{name}", **(numbers | limits | changes)))
        return made[-1]

    yield verifier
    for each in made:
        each.close()


def count(result):
    return {name.removeprefix("reward/"): number for name, number in result.metrics.items() if number}


@pytest.mark.parametrize("in_process", [True, False])
def test_what_goes_wrong_costs_one_completion_and_is_told_once(in_process, make, caplog):
    verifier = make("obey", in_process=in_process)
    deadly = [] if in_process else ["loop", "exit"]
    texts = ["abc", "nan", "raise", "text", "none", *deadly, "numpy", "decimal", "same", "a"]
    with caplog.at_level(logging.WARNING):
        result = verifier.score([texts, ["same"]], [("1234",), ("x", "y")], ["what?", "why?"])
        verifier.score([["raise"]], [("1",)])
    failed = [-1.0] * (4 + len(deadly))
    assert result.rewards == [[0.75, *failed, 1.0, 0.5, 1.0, 0.25], [1.0]]
    expected = {"exceptions": 1, "not_a_number": 3} | ({} if in_process else {"timeouts": 1, "crashes": 1})
    assert count(result) == expected
    verdicts = [grade.reason for grade in result.grades[0]]
    assert (verdicts[0], verdicts[2], verdicts[-1]) == ("correct", "error", "wrong")
    told = [record.getMessage() for record in caplog.records if "reward function" in record.getMessage()]
    failures = f"odd_rewards.obey failed for {len(failed)} completions, which earn -1"
    assert told == [f"reward function {failures}: KeyError: 'what?'"]
    assert verifier.gradable([("",), ("1",)]) == [True, True]


@pytest.mark.parametrize("in_process", [True, False])
def test_a_function_of_lists_sees_the_step_at_once(in_process, make):
    verifier = make("rank", in_process=in_process)
    asked = ([["c", "a"], ["b", "a"]], [("1",), ("1",)], ["q", "r"])
    assert verifier.score(*asked).rewards == [[13.0, 10.0], [2.0, 0.0]]
    assert verifier.score([], []).rewards == []


def test_a_function_of_lists_owes_a_reward_to_each(make, caplog):
    result = make("too_few").score([["a", "b"]], [("1",)])
    assert result.rewards == [[-1.0, -1.0]] and count(result) == {"exceptions": 2}
    assert "ValueError: 1 rewards for 2 completions" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "two",
            r"function=odd_rewards.two: expected a function \(completion, answer, problem\) -> reward \(",
        ),
        ("os.system", r"function=odd_rewards.os.system: there is no module odd_rewards.os"),
        ("takes_lists", r"function=odd_rewards.takes_lists: unknown function; expected one of obey"),
    ],
)
def test_what_is_no_reward_function_is_refused(name, message, make):
    with pytest.raises(ConfigError, match=rf"^reward\.verifier\.{message}"):
        make(name)
