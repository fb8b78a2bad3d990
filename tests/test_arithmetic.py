"""Made problems: always right, never shared between splits, the same everywhere."""

import itertools
import operator
import random
import re
from collections import Counter
from functools import partial

import pytest
from omegaconf import OmegaConf

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import conf_dir
from capo_exp.data import arithmetic
from capo_exp.data.arithmetic import (
    calculate,
    calculate_with_slips,
    draw_imitations,
    draw_tasks,
    is_hard,
    problems,
    work_out,
)

SOURCE = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dataset" / "arithmetic.yaml").source)
NUMBERS = {key: value for key, value in SOURCE.items() if not key.startswith("_")}
DIVIDE = operator.floordiv
RIGHT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": DIVIDE, "//": DIVIDE}
FIRST_PROBLEM = ("arithmetic/91ffb545b96a1496", "Solve x - 8 = 51 for x.", "59")


def make(split, **changes):
    return problems(split, path=None, **{**NUMBERS, **changes})


@pytest.fixture(scope="module")
def train():
    return make("train")


@pytest.fixture(scope="module")
def test():
    return make("test")


def calculations(text):
    """(operation, left, right, result) of each written step."""
    found = re.findall(r"(-?\d+)(//|[-+*/])(-?\d+)=(-?\d+)", text)
    return [(op, int(a), int(b), int(c)) for a, op, b, c in found]


def test_imitations_box_the_share_that_is_asked_for():
    def some(share, count=200):
        numbers = {"slip_rate": 0.0, "families": NUMBERS["families"]}
        return list(itertools.islice(draw_imitations(3, boxed_share=share, **numbers), count))

    assert all("\\boxed{" in text for _, text in some(1.0))
    assert all(re.search(r" -?\d+\.$", text) and "boxed" not in text for _, text in some(0.0))
    assert 0.3 < sum("\\boxed{" in text for _, text in some(0.4)) / 200 < 0.5
    [boxed], [bare] = some(1.0, 1), some(0.0, 1)
    assert bare == (boxed[0], boxed[1].replace("\\boxed{", "").replace("}", "."))


def test_the_seed_decides_the_problems(train):
    """The same on every machine and in every process: a literal, not a second call. More keep the first."""
    assert len({p.id for p in train}) == len({p.problem for p in train}) == NUMBERS["num_train"]
    assert (train[0].id, train[0].problem, train[0].answer) == FIRST_PROBLEM
    assert make("train", num_train=300) == train[:300]
    assert make("train", num_train=50, seed=1) != train[:50]


def test_splits_share_no_problem_in_any_wording(train, test):
    assert not {p.problem for p in train} & {p.problem for p in test}
    other = make("train", seed=7)  # for any seed
    steps = [{tuple(calculations(p.demonstration)) for p in split} for split in (train + other, test)]
    assert not steps[0] & steps[1]


def test_demonstrations_are_right_and_end_in_the_answer(train, test):
    expected = {(family, str(level)) for family, levels in NUMBERS["families"].items() for level in levels}
    assert {(p.family, p.level) for p in test} == expected
    for p in train + test:
        steps = calculations(p.demonstration)
        assert steps and all(RIGHT[op](a, b) == c for op, a, b, c in steps), p
        assert p.demonstration.endswith(f"\\boxed{{{p.answer}}}"), p
        assert steps[-1][-1] == int(p.answer), p
        assert all(a % b == 0 for op, a, b, _ in steps if op == "/"), p  # an exact division


@pytest.mark.parametrize("slip_rate", [0.0, 0.08])
def test_steps_slip_at_the_stated_rate(slip_rate):
    rng, source = random.Random(0), draw_tasks("train", random.Random(1), NUMBERS["families"])
    slips, expected = 0, 0.0
    for task in itertools.islice(source, 2000):
        steps, _ = work_out(task, partial(calculate_with_slips, rng, slip_rate))
        for op, a, b, c in calculations(" ".join(steps)):
            slips += RIGHT[op](a, b) != c
            expected += slip_rate * (arithmetic.HARD_STEP if is_hard(op, a, b) else 1.0)
    assert abs(slips - expected) <= 4 * expected**0.5, (slips, expected)


def test_slips_carry_on_to_a_wrong_answer():
    """Without cancellation a solution with a slip is wrong; nine in ten are."""
    rng, outcomes = random.Random(0), Counter()
    for task in itertools.islice(draw_tasks("train", random.Random(1), NUMBERS["families"]), 1000):
        steps, answer = work_out(task, partial(calculate_with_slips, rng, 0.08))
        slipped = any(RIGHT[op](a, b) != c for op, a, b, c in calculations(" ".join(steps)))
        outcomes[slipped, answer == work_out(task, calculate)[1]] += 1
    assert outcomes[False, False] == 0
    assert outcomes[True, False] > 0.9 * (outcomes[True, False] + outcomes[True, True])
    assert 300 < outcomes[True, False] < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, "dataset.train_split"),
        ({"path": "/somewhere"}, "dataset.path"),
        ({"families": {"geometry": [1]}}, "dataset.source.families"),
        ({"families": {"product": [1]}, "num_train": 1000}, "dataset.source.num_"),
        ({"families": {"missing": [1, 4]}}, r"families.missing=\[1, 4\]: expected levels from 1 to 3"),
        ({"families": {"chain": []}}, "dataset.source.families=.*: expected at least one level"),
    ],
)
def test_bad_input_names_the_key(changes, message):
    arguments = {"split": "train", "path": None, **NUMBERS, **changes}
    with pytest.raises(ConfigError, match=message):
        problems(arguments.pop("split"), **arguments)
