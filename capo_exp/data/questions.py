"""Short questions for a pretrained chat model, made here from a seed: sums, the largest of three numbers, and
word problems of two steps. Answers are whole numbers. Train and test are distinct draws of one seed.
"""

import random
from collections.abc import Callable
from typing import Annotated

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.ranges import AT_LEAST_0, NUM_PROBLEMS
from capo_exp.core.types import Problem
from capo_exp.data.rows import check_made

Draw = Callable[[random.Random], tuple[str, int]]
"""Draws (question, answer)."""

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")


def sum_of_two(rng: random.Random) -> tuple[str, int]:
    """Adds two two-digit numbers."""
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    return f"What is {first} + {second}?", first + second


def largest_of_three(rng: random.Random) -> tuple[str, int]:
    """Picks the largest of three different two-digit numbers."""
    a, b, c = rng.sample(range(10, 100), 3)
    return f"Which is the largest of the numbers {a}, {b} and {c}? Answer with the number only.", max(a, b, c)


def word_problem(rng: random.Random) -> tuple[str, int]:
    """Tells a story of two steps: a product or a sum, then something given away or gained."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, extra = rng.randint(2, 9), rng.randint(3, 12), rng.randint(2, 20)
    if rng.random() < 0.5:
        start = f"{name} has {boxes} boxes with {each} {thing} each"
        amount = boxes * each
    else:
        start = f"{name} has {boxes + 10} {thing} and buys {each} more"
        amount = boxes + 10 + each
    if rng.random() < 0.5 or extra >= amount:
        return (
            f"{start}. Then {name} finds {extra} more {thing}. How many {thing} are there now?",
            amount + extra,
        )
    return f"{start}. Then {name} gives away {extra} {thing}. How many {thing} are left?", amount - extra


KINDS: dict[str, Draw] = {"sums": sum_of_two, "max_of_three": largest_of_three, "word_problems": word_problem}


def problems(
    split: str,
    *,
    path: str | None,
    seed: Annotated[int, AT_LEAST_0],
    kind: str,
    num_train: Annotated[int, NUM_PROBLEMS],
    num_eval: Annotated[int, NUM_PROBLEMS],
) -> list[Problem]:
    """Returns distinct problems of one split, the same for the same seed everywhere; test is drawn first, so
    that more training problems change no test.

    Raises:
        ConfigError: a path, an unknown split or kind, or more problems than are found.
    """
    check_made(split, path)
    if kind not in KINDS:
        raise ConfigError(f"dataset.source.kind={kind}: unknown kind; {suggest(kind, KINDS)}")
    wanted, rng = num_eval + num_train, random.Random(seed)
    found: dict[str, int] = {}
    for _ in range(4 * wanted + 100):
        if len(found) == wanted:
            break
        found.setdefault(*KINDS[kind](rng))
    if len(found) < wanted:
        raise ConfigError(f"got {wanted} problems, found {len(found)}; lower dataset.source.num_train")
    drawn = [Problem(f"{kind}/{i}", text, str(answer)) for i, (text, answer) in enumerate(found.items())]
    return drawn[:num_eval] if split == "test" else drawn[num_eval:]
