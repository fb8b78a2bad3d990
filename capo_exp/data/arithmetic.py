"""Verifiable reasoning problems made here from a seed; nothing is downloaded.

A `Task` is a question and the calculations that answer it. Done by `exact` they yield the answer and a
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

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Problem

Calculate = Callable[[str, int, int], int]  # (operation, left, right) -> result; + - * / //
Step = tuple[str, int | str, int | str]  # operation and operands; "#0" is the result of the first step
Levels = Mapping[str, Sequence[int]]  # family name -> difficulties to draw from

TEST_SHARE = 1 / 8  # of all possible tasks; held out from train and from the warm start
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


def exact(op: str, a: int, b: int) -> int:
    """The right result of one step; a division is rounded down."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] if op in "+-*" else a // b


def is_hard(op: str, a: int, b: int) -> bool:
    """True where people slip: a carry, a borrow, a quotient."""
    return {"+": a % 10 + b % 10 >= 10, "-": a % 10 < b % 10}.get(op, op == "//")


def slipping(rng: random.Random, slip_rate: float, op: str, a: int, b: int) -> int:
    """The result of one step, wrong with probability `slip_rate`, HARD_STEP times that if it is hard."""
    right = exact(op, a, b)
    slips = rng.random() < slip_rate * (HARD_STEP if is_hard(op, a, b) else 1.0)
    return slip(op, a, b, right, rng) if slips else right


def slip(op: str, a: int, b: int, right: int, rng: random.Random) -> int:
    """A plausible wrong result: a forgotten carry or borrow, else one or ten off."""
    if op in "+-" and is_hard(op, a, b) and rng.random() < FORGETS:
        return right - 10 if op == "+" else right + 10
    return right + rng.choice((-1, 1, -10, 10) if right >= 20 else (-1, 1))


def worked(task: Task, calculate: Calculate) -> tuple[list[str], int]:
    """Runs the calculations in order. Returns the written steps and the answer."""
    results: dict[str, int] = {}
    written: list[str] = []
    for i, (op, left, right) in enumerate(task.steps):
        a, b = (results[x] if isinstance(x, str) else x for x in (left, right))
        results[f"#{i}"] = calculate(op, a, b)
        written.append(f"{a}{op}{b}={results[f'#{i}']}")
    return written, results[f"#{len(written) - 1}"]


def render(task: Task, written: Sequence[str], answer: int) -> str:
    """The solution as text, ending in the boxed answer."""
    sentences = [f"{word} {step}{task.unit}." for word, step in zip(task.words[:-1], written, strict=True)]
    return " ".join([*sentences, f"{task.words[-1]} \\boxed{{{answer}}}"])


def demonstration_with_slips(task: Task, rng: random.Random, slip_rate: float) -> str:
    """A worked solution in which steps slip and the rest follows from the slip."""
    return render(task, *worked(task, partial(slipping, rng, slip_rate)))


def imitations(
    seed: int, *, slip_rate: float, boxed_share: float, families: Levels
) -> Iterator[tuple[str, str]]:
    """Endless (problem, worked solution with slips) of the train split, for the warm start.

    Args:
        seed: of the problems and the slips.
        slip_rate: of an easy step; see `slipping`.
        boxed_share: of the solutions, how many put the answer in a box; the others just say it.
        families: as of `problems`.
    """
    rng = random.Random(seed)
    for task in tasks("train", random.Random(seed + 1), families):
        text = demonstration_with_slips(task, rng, slip_rate)
        yield task.text, text if boxed_share == 1 or rng.random() < boxed_share else unboxed(text)


def unboxed(text: str) -> str:
    """A solution that says its answer without a box."""
    head, answer = text[:-1].rsplit("\\boxed{", 1)
    return f"{head}{answer}."


def pick(rng: random.Random, kind: str) -> str:
    """One word with Zipf frequencies, as in real text: early ones are common, late ones rare."""
    return rng.choices(WORDS[kind], weights=[1 / (rank + 2) for rank in range(len(WORDS[kind]))])[0]


def phrases(rng: random.Random, num_steps: int, last: str = "") -> tuple[str, ...]:
    """Opening words for the sentences of a solution."""
    return (pick(rng, "first"), *(pick(rng, "next") for _ in range(num_steps - 1)), last or pick(rng, "last"))


def running(start: int, changes: Sequence[tuple[str, int]]) -> tuple[Step, ...]:
    """Steps that apply one change after the other."""
    return tuple((op, f"#{i - 1}" if i else start, n) for i, (op, n) in enumerate(changes))


def handy(rng: random.Random) -> int:
    """A number for mental arithmetic: one digit, or now and then whole tens."""
    return rng.randrange(2, 10) if rng.random() < 0.9 else rng.randrange(10, 60, 10)


def draw_changes(rng: random.Random, start: int, count: int) -> list[tuple[str, int]]:
    """Additions and subtractions that keep the total above 0."""
    changes: list[tuple[str, int]] = []
    for _ in range(count):
        number = handy(rng)
        op = rng.choice("+-") if number < start < 90 else ("-" if number < start else "+")
        start = exact(op, start, number)
        changes.append((op, number))
    return changes


def chain(rng: random.Random, level: int) -> Task:
    """Sums and differences of `level` steps."""
    start = rng.randrange(10, 100)
    changes = draw_changes(rng, start, level)
    form = rng.choice(("Compute {}.", "What is {}?", "Evaluate {}."))
    text = form.format(f"{start}" + "".join(f" {op} {n}" for op, n in changes))
    return Task("chain", level, text, running(start, changes), phrases(rng, level))


def story(rng: random.Random, level: int) -> Task:
    """A person gains and loses things, `level` times."""
    name, things, start = pick(rng, "names"), pick(rng, "things"), rng.randrange(10, 100)
    changes = draw_changes(rng, start, level)
    events = " and ".join(f"{pick(rng, op)} {rng.choice((str(n), SPELLED[n]))}" for op, n in changes)
    text = f"{name} has {start} {things}, {events}. How many {things} does {name} have now?"
    words = phrases(rng, level, rng.choice(("", f"So {name} has")))
    return Task("story", level, text, running(start, changes), words, f" {things}")


def product(rng: random.Random, level: int) -> Task:
    """Multiplication by parts: tens, ones, sum."""
    a, b = rng.randrange(3, 10), rng.randrange(11, 30 if level == 1 else 100)
    steps = (("*", a, b - b % 10), ("*", a, b % 10), ("+", "#0", "#1"))
    text = rng.choice(("Compute {} * {}.", "What is {} times {}?", "Multiply {} by {}.")).format(a, b)
    return Task("product", level, text, steps, phrases(rng, 3))


def shop(rng: random.Random, level: int) -> Task:
    """Several things at one price: with one thing more, or (level 2) how much money is left."""
    name, things = pick(rng, "names"), pick(rng, "things")
    price, count = rng.randrange(3, 10), rng.randrange(2, 10)
    other = handy(rng) if level == 1 else rng.choice((90, 100))
    added = f" and a bag for {other} cents. What is the cost?"
    paid = f". {name} has {other} cents. How many cents are left?"
    text = f"{name} buys {count} {things} at {price} cents each{added if level == 1 else paid}"
    last: Step = ("+", "#0", other) if level == 1 else ("-", other, "#0")
    return Task("shop", level, text, (("*", count, price), last), phrases(rng, 2), " cents")


def remainder(rng: random.Random, level: int) -> Task:
    """What a division leaves."""
    divisor = rng.randrange(3, 6 if level == 1 else 10)
    number = rng.randrange(divisor + 1, divisor * 10)
    steps = (("//", number, divisor), ("*", "#0", divisor), ("-", number, "#1"))
    form = rng.choice(("What is the remainder of {} divided by {}?", "Find {} mod {}."))
    return Task("remainder", level, form.format(number, divisor), steps, phrases(rng, 3))


def missing(rng: random.Random, level: int) -> Task:
    """An unknown number in a sum, a difference, or a product plus a number."""
    x, a, b = rng.randrange(2, 100 if level < 3 else 10), handy(rng), rng.randrange(2, 10)
    equation, steps = (
        (f"x + {a} = {x + a}", running(x + a, [("-", a)])),
        (f"x - {a} = {x}", running(x, [("+", a)])),
        (f"{b} * x + {a} = {b * x + a}", running(b * x + a, [("-", a), ("/", b)])),
    )[level - 1]
    text = rng.choice(("Find x: {}.", "Solve {} for x.", "What is x if {}?")).format(equation)
    return Task("missing", level, text, steps, phrases(rng, len(steps)))


FAMILIES = {make.__name__: make for make in (chain, story, product, shop, remainder, missing)}


def held_out(task: Task) -> bool:
    """True if the task belongs to the test split, whatever its wording."""
    digest = hashlib.sha256(";".join(worked(task, exact)[0]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def tasks(split: str, rng: random.Random, families: Levels) -> Iterator[Task]:
    """Endless tasks of one split, with repetitions; every (family, level) is equally frequent."""
    if split not in ("train", "test"):
        raise ConfigError(
            f"got split {split!r}, expected train or test; change dataset.train_split/eval_split"
        )
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ConfigError(f"got {unknown}, expected some of {list(FAMILIES)}; change dataset.source.families")
    kinds = [(FAMILIES[name], level) for name, levels in families.items() for level in levels]
    while True:
        make, level = rng.choice(kinds)
        if held_out(task := make(rng, level)) == (split == "test"):
            yield task


def as_problem(task: Task) -> Problem:
    """The task with its right answer and demonstration."""
    written, answer = worked(task, exact)
    name = f"arithmetic/{hashlib.sha256(task.text.encode()).hexdigest()[:16]}"
    return Problem(name, task.text, str(answer), task.family, str(task.level), render(task, written, answer))


def problems(
    split: str, *, path: str | None, seed: int, num_train: int, num_eval: int, families: Levels
) -> list[Problem]:
    """Distinct problems of one split, the same for the same seed everywhere.

    Raises:
        ConfigError: a path, an unknown split or family, or more problems than the families hold.
    """
    if path is not None:
        raise ConfigError(f"got dataset.path={path}, expected null: arithmetic problems are made, not read")
    count = num_eval if split == "test" else num_train
    found: dict[str, Problem] = {}
    for task in itertools.islice(tasks(split, random.Random(seed), families), 20 * count + 1000):
        if len(found) == count:
            break
        found.setdefault(task.text, as_problem(task))
    if len(found) < count:
        raise ConfigError(f"got {count} {split} problems, found {len(found)}; lower dataset.source.num_*")
    return list(found.values())
