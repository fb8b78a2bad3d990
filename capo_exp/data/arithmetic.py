"""Verifiable reasoning problems made here from a seed; nothing is downloaded.

A `Task` is a question and the calculations that answer it. Done by `calculate` they yield the answer and a
demonstration that is always right; done by a calculator that slips they yield worked solutions in which a
wrong step is carried on consistently, which is what the warm start of the tiny model imitates.
Train and test are split by a stable hash of the calculations, so a test problem is in train under no wording.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from capo_exp.config.errors import error
from capo_exp.config.ranges import AT_LEAST_0, AT_LEAST_1, NUM_PROBLEMS, SHARE
from capo_exp.core.types import Problem
from capo_exp.data.rows import check_made, is_held_out

Calculate = Callable[[str, int, int], int]  # (operation, left, right) -> result; + - * / //
Step = tuple[str, int | str, int | str]  # operation and operands; "#0" is the result of the first step
Levels = Mapping[str, Sequence[Annotated[int, AT_LEAST_1]]]  # family name -> difficulties to draw from

HARD_STEP = 7.25  # a hard step slips this many times as often as an easy one
FORGETS = 0.9  # of the slips where a carry or borrow is due, the part that forgets it
LEXICON = """
names: Mia Omar Lena Noah Aiko Ravi Zoe Hugo Nina Tariq Ella Bruno Priya Felix Sofia Kofi Clara Diego Yuki
 Marta Ivan Leila Jonas Amara Pablo Ingrid Samir Freya Mateo Hana Oscar Ruth Viktor Dalia Emil Carmen Stella
 Boris Wanda Gustav Thea Rashid Olive Kenji Paula Dmitri Fatima Jacob Uma Henrik Bianca Chidi Esther Lucia
 Abdul Greta Milan Sunita Walter Beatriz Farid Joanna Magnus Naomi Pedro Ulrich Xavier Yasmin Zainab
things: apples pens coins books shells cards stamps marbles buttons candles pebbles lemons cups keys ribbons
 pencils tickets balloons peaches walnuts stickers spoons feathers blocks onions magnets baskets carrots
 bottles muffins plums violins kites lanterns jars gloves beads rockets turnips bricks cherries mirrors
 whistles envelopes puzzles hammers drums oranges cookies plates badges crayons pumpkins trumpets blankets
 acorns wheels notebooks sandwiches dolls postcards radishes umbrellas chestnuts hats bananas scarves brushes
 sweaters paintings tulips necklaces suitcases hedgehogs daisies tomatoes bracelets yoyos figs
+: finds buys wins collects receives borrows picks earns
-: loses sells breaks donates drops hides trades spends
first: First Start Begin Now Initially Here
next: Then Next Now Also Further Afterwards
last: So Answer: Thus Hence Therefore Finally Result: Altogether
ones: zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
 seventeen eighteen nineteen
tens: twenty thirty forty fifty sixty seventy eighty ninety
"""
WORDS = {line.split()[0][:-1]: line.split()[1:] for line in LEXICON.strip().replace("\n ", " ").split("\n")}
TENS, ONES = WORDS["tens"], WORDS["ones"]
SPELLED = [*ONES, *(f"{ten}-{one}".removesuffix("-zero") for ten in TENS for one in ONES[:10])]


@dataclass(frozen=True)
class Task:
    """A question with the calculations that answer it."""

    family: str
    level: int
    text: str
    steps: tuple[Step, ...]  # the result of the last one is the answer
    words: tuple[str, ...]  # the first of each sentence of the solution; the last one leads to the answer
    unit: str = ""  # what the numbers count, with a leading space; empty for pure numbers


def calculate(op: str, a: int, b: int) -> int:
    """Returns the right result of one step; a division is rounded down."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] if op in "+-*" else a // b


def is_hard(op: str, a: int, b: int) -> bool:
    """Returns whether people slip here: a carry, a borrow, a quotient."""
    return {"+": a % 10 + b % 10 >= 10, "-": a % 10 < b % 10}.get(op, op == "//")


def calculate_with_slips(rng: random.Random, slip_rate: float, op: str, a: int, b: int) -> int:
    """Returns the result of one step, wrong with probability `slip_rate`, or HARD_STEP times that if hard: a
    forgotten carry or borrow, else one or ten off."""
    right = calculate(op, a, b)
    if rng.random() >= slip_rate * (HARD_STEP if is_hard(op, a, b) else 1.0):
        return right
    if op in "+-" and is_hard(op, a, b) and rng.random() < FORGETS:
        return right - 10 if op == "+" else right + 10
    return right + rng.choice((-1, 1, -10, 10) if right >= 20 else (-1, 1))


def work_out(task: Task, by: Calculate) -> tuple[list[str], int]:
    """Does the calculations in order; returns the written steps and the answer."""
    results: dict[str, int] = {}
    written: list[str] = []
    for i, (op, left, right) in enumerate(task.steps):
        a, b = (results[x] if isinstance(x, str) else x for x in (left, right))
        results[f"#{i}"] = by(op, a, b)
        written.append(f"{a}{op}{b}={results[f'#{i}']}")
    return written, results[f"#{len(written) - 1}"]


def write_solution(task: Task, written: Sequence[str], answer: int) -> str:
    sentences = [f"{word} {step}{task.unit}." for word, step in zip(task.words[:-1], written, strict=True)]
    return " ".join([*sentences, f"{task.words[-1]} \\boxed{{{answer}}}"])


def draw_imitations(
    seed: int, *, slip_rate: Annotated[float, SHARE], boxed_share: Annotated[float, SHARE], families: Levels
) -> Iterator[tuple[str, str]]:
    """Yields (problem, worked solution with slips) of the train split without end, for the warm start.

    Args:
        seed: draws the problems and the slips.
        slip_rate: probability that an easy step slips; see `calculate_with_slips`.
        boxed_share: share of the solutions that put the answer in a box; the others just say it.
        families: see `problems`.
    """
    rng = random.Random(seed)
    for task in draw_tasks("train", random.Random(seed + 1), families):
        text = write_solution(task, *work_out(task, partial(calculate_with_slips, rng, slip_rate)))
        boxed = boxed_share == 1 or rng.random() < boxed_share
        yield task.text, text if boxed else text[:-1].replace("\\boxed{", "") + "."


def draw_word(rng: random.Random, kind: str) -> str:
    """Draws one word with Zipf frequencies, as in real text."""
    return rng.choices(WORDS[kind], weights=[1 / (rank + 2) for rank in range(len(WORDS[kind]))])[0]


def draw_words(rng: random.Random, num_steps: int, last: str = "") -> tuple[str, ...]:
    """Draws opening words for the sentences of a solution."""
    middle = [draw_word(rng, kind) for kind in ("first", *["next"] * (num_steps - 1))]
    return (*middle, last or draw_word(rng, "last"))


def chain_steps(start: int, changes: Sequence[tuple[str, int]]) -> tuple[Step, ...]:
    return tuple((op, f"#{i - 1}" if i else start, n) for i, (op, n) in enumerate(changes))


def draw_number(rng: random.Random) -> int:
    """Draws a number for mental arithmetic: one digit, or now and then whole tens."""
    return rng.randrange(2, 10) if rng.random() < 0.9 else rng.randrange(10, 60, 10)


def draw_changes(rng: random.Random, start: int, count: int) -> list[tuple[str, int]]:
    """Draws additions and subtractions that keep the total above 0."""
    changes: list[tuple[str, int]] = []
    for _ in range(count):
        number = draw_number(rng)
        op = rng.choice("+-") if number < start < 90 else ("-" if number < start else "+")
        start = calculate(op, start, number)
        changes.append((op, number))
    return changes


def make_chain(rng: random.Random, level: int) -> Task:
    """Makes sums and differences of `level` steps."""
    start = rng.randrange(10, 100)
    changes = draw_changes(rng, start, level)
    form = rng.choice(("Compute {}.", "What is {}?", "Evaluate {}."))
    text = form.format(f"{start}" + "".join(f" {op} {n}" for op, n in changes))
    return Task("chain", level, text, chain_steps(start, changes), draw_words(rng, level))


def make_story(rng: random.Random, level: int) -> Task:
    """Makes a story of a person who gains and loses things, `level` times."""
    name, things, start = draw_word(rng, "names"), draw_word(rng, "things"), rng.randrange(10, 100)
    changes = draw_changes(rng, start, level)
    events = " and ".join(f"{draw_word(rng, op)} {rng.choice((str(n), SPELLED[n]))}" for op, n in changes)
    text = f"{name} has {start} {things}, {events}. How many {things} does {name} have now?"
    words = draw_words(rng, level, rng.choice(("", f"So {name} has")))
    return Task("story", level, text, chain_steps(start, changes), words, f" {things}")


def make_product(rng: random.Random, level: int) -> Task:
    """Makes a multiplication by parts: tens, ones, sum."""
    a, b = rng.randrange(3, 10), rng.randrange(11, 30 if level == 1 else 100)
    steps = (("*", a, b - b % 10), ("*", a, b % 10), ("+", "#0", "#1"))
    text = rng.choice(("Compute {} * {}.", "What is {} times {}?", "Multiply {} by {}.")).format(a, b)
    return Task("product", level, text, steps, draw_words(rng, 3))


def make_shop(rng: random.Random, level: int) -> Task:
    """Makes a purchase of several things at one price: with one thing more, or (level 2) the money left."""
    name, things = draw_word(rng, "names"), draw_word(rng, "things")
    price, count = rng.randrange(3, 10), rng.randrange(2, 10)
    other = draw_number(rng) if level == 1 else rng.choice((90, 100))
    added = f" and a bag for {other} cents. What is the cost?"
    paid = f". {name} has {other} cents. How many cents are left?"
    text = f"{name} buys {count} {things} at {price} cents each{added if level == 1 else paid}"
    last: Step = ("+", "#0", other) if level == 1 else ("-", other, "#0")
    return Task("shop", level, text, (("*", count, price), last), draw_words(rng, 2), " cents")


def make_remainder(rng: random.Random, level: int) -> Task:
    """Asks what a division leaves."""
    divisor = rng.randrange(3, 6 if level == 1 else 10)
    number = rng.randrange(divisor + 1, divisor * 10)
    steps = (("//", number, divisor), ("*", "#0", divisor), ("-", number, "#1"))
    form = rng.choice(("What is the remainder of {} divided by {}?", "Find {} mod {}."))
    return Task("remainder", level, form.format(number, divisor), steps, draw_words(rng, 3))


def make_missing(rng: random.Random, level: int) -> Task:
    """Asks for an unknown number in a sum, a difference, or a product plus a number."""
    x, a, b = rng.randrange(2, 100 if level < 3 else 10), draw_number(rng), rng.randrange(2, 10)
    equation, steps = (
        (f"x + {a} = {x + a}", chain_steps(x + a, [("-", a)])),
        (f"x - {a} = {x}", chain_steps(x, [("+", a)])),
        (f"{b} * x + {a} = {b * x + a}", chain_steps(b * x + a, [("-", a), ("/", b)])),
    )[level - 1]
    text = rng.choice(("Find x: {}.", "Solve {} for x.", "What is x if {}?")).format(equation)
    return Task("missing", level, text, steps, draw_words(rng, len(steps)))


FAMILIES = {
    "chain": (make_chain, 20),
    "story": (make_story, 20),
    "product": (make_product, 2),
    "shop": (make_shop, 2),
    "remainder": (make_remainder, 2),
    "missing": (make_missing, 3),
}
"""How tasks are made, and the highest level."""


def draw_tasks(split: str, rng: random.Random, families: Levels) -> Iterator[Task]:
    """Yields tasks of one split without end, with repetitions; all (family, level) are equally frequent."""
    key = "dataset.source.families"
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise error(key, ", ".join(unknown), f"some of {', '.join(FAMILIES)}")
    for name, levels in families.items():
        if any(level > FAMILIES[name][1] for level in levels):
            raise error(f"{key}.{name}", levels, f"levels from 1 to {FAMILIES[name][1]}")
    kinds = [(FAMILIES[name][0], level) for name, levels in families.items() for level in levels]
    if not kinds:
        raise error(key, dict(families), "at least one level of one family")
    while True:
        make, level = rng.choice(kinds)
        task = make(rng, level)
        if is_held_out(";".join(work_out(task, calculate)[0])) == (split == "test"):  # in whatever wording
            yield task


def to_problem(task: Task) -> Problem:
    """Returns the task with its right answer and demonstration."""
    written, answer = work_out(task, calculate)
    name = f"arithmetic/{hashlib.sha256(task.text.encode()).hexdigest()[:16]}"
    solution = write_solution(task, written, answer)
    return Problem(name, task.text, str(answer), task.family, str(task.level), solution)


def problems(
    split: str,
    *,
    path: str | None,
    seed: Annotated[int, AT_LEAST_0],
    num_train: Annotated[int, NUM_PROBLEMS],
    num_eval: Annotated[int, NUM_PROBLEMS],
    families: Levels,
) -> list[Problem]:
    """Makes distinct problems of one split, the same for the same seed everywhere.

    Raises:
        ConfigError: a path, an unknown split or family, or more problems than the families hold.
    """
    check_made(split, path)
    count = num_eval if split == "test" else num_train
    found: dict[str, Problem] = {}
    for task in itertools.islice(draw_tasks(split, random.Random(seed), families), 20 * count + 1000):
        if len(found) == count:
            break
        found.setdefault(task.text, to_problem(task))
    if len(found) < count:
        key = "num_eval" if split == "test" else "num_train"
        raise error(f"dataset.source.{key}", count, f"at most {len(found)}, which is all that were found")
    return list(found.values())
