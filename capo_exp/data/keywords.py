"""A made language in which many words each carry a little of the answer's chance to be right.

The question is which digit a number begins with. A completion is `( word word ... ) \\boxed{digit}`; its
words are good ones, bad ones and fillers. Where the warm start imitates, the answer is right with probability
sigmoid(sharpness (good words - bad words)) and else a random digit, so a model that has learned it is right
as often as its own words are good. Reinforcement has to move many tokens, each of little weight, and to leave
the delimiters alone. Fillers have Zipf frequencies, so that a large vocabulary has rare rows. Train and test
numbers are split by a stable hash.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Annotated

from capo_exp.config.errors import error
from capo_exp.config.ranges import AT_LEAST_0, AT_LEAST_1, FINITE, SHARE, Rule
from capo_exp.core.types import Problem
from capo_exp.data.rows import check_made, is_held_out

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
LOWEST, HIGHEST = 10_000, 99_999
QUESTION = "First digit of {}?"
NUM_NUMBERS = Rule(lambda v: 1 <= v <= 5_000, "an integer in [1, 5,000]")
"""Of the 11,000 numbers that test has, so that drawing finds them soon."""


@dataclass(frozen=True)
class Language:
    """A language's words, in order of frequency, and how completions are drawn."""

    good: Sequence[str]
    bad: Sequence[str]
    fillers: Sequence[str]
    weights: Sequence[float]
    """Frequencies of the fillers, each with those before it."""
    followers: Mapping[str, str]
    """Filler -> the one that comes after it, where the one before decides."""
    good_share: float
    bad_share: float
    follow_share: float
    words: tuple[int, int]
    sharpness: float


def make_language(
    *,
    seed: Annotated[int, AT_LEAST_0],
    num_keywords: Annotated[int, AT_LEAST_1],
    num_fillers: Annotated[int, AT_LEAST_1],
    good_share: Annotated[float, SHARE],
    bad_share: Annotated[float, SHARE],
    follow_share: Annotated[float, SHARE],
    fewest_words: Annotated[int, AT_LEAST_1],
    most_words: Annotated[int, AT_LEAST_1],
    sharpness: Annotated[float, FINITE],
) -> Language:
    """Makes the language of a seed.

    Args:
        seed: draws the words, and which filler follows which.
        num_keywords: good words; as many are bad.
        num_fillers: other words, the n-th with a frequency of 1 / n.
        good_share: probability that a word is a good one.
        bad_share: probability that it is a bad one.
        follow_share: probability that the filler before decides which filler comes.
        fewest_words: of a completion.
        most_words: of a completion.
        sharpness: steepness of the step from wrong to right answers.

    Raises:
        ConfigError: more words than there are, or shares or lengths that do not fit together.
    """
    key, room = "dataset.source.language", len(SYLLABLES) ** 2
    total = 2 * num_keywords + num_fillers
    if total > room:
        raise error(f"{key}.num_fillers", num_fillers, f"at most {room:,} words, twice num_keywords included")
    if good_share + bad_share > 1:
        raise error(f"{key}.bad_share", bad_share, f"at most 1 - good_share = {1 - good_share:g}")
    if fewest_words > most_words:
        raise error(f"{key}.fewest_words", fewest_words, f"at most most_words={most_words}")
    rng = random.Random(seed)
    chosen = rng.sample(["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)], total)
    fillers = chosen[2 * num_keywords :]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(num_fillers)))  # Zipf's
    followers = rng.choices(fillers, cum_weights=weights, k=num_fillers)
    return Language(
        good=chosen[:num_keywords],
        bad=chosen[num_keywords : 2 * num_keywords],
        fillers=fillers,
        weights=weights,
        followers=dict(zip(fillers, followers, strict=True)),
        good_share=good_share,
        bad_share=bad_share,
        follow_share=follow_share,
        words=(fewest_words, most_words),
        sharpness=sharpness,
    )


def say_words(language: Language, rng: random.Random) -> list[str]:
    """Draws one completion's words."""
    said: list[str] = []
    for _ in range(rng.randint(*language.words)):
        said.append(_say_word(language, rng, said[-1] if said else ""))
    return said


def _say_word(language: Language, rng: random.Random, before: str) -> str:
    draw = rng.random()
    if draw < language.good_share:
        return rng.choice(language.good)
    if draw < language.good_share + language.bad_share:
        return rng.choice(language.bad)
    if before in language.followers and rng.random() < language.follow_share:
        return language.followers[before]
    return rng.choices(language.fillers, cum_weights=language.weights)[0]


def say_answer(language: Language, rng: random.Random, words: Sequence[str], digit: str) -> str:
    """Returns the digit with the probability that the words make, else any digit, also the same."""
    score = language.sharpness * sum((word in language.good) - (word in language.bad) for word in words)
    return digit if rng.random() < 1 / (1 + exp(-score)) else str(rng.randrange(10))


def write_completion(words: Sequence[str], answer: str) -> str:
    """Writes a completion as text."""
    return f"( {' '.join(words)} ) \\boxed{{{answer}}}"


def draw_numbers(split: str, rng: random.Random) -> Iterator[int]:
    """Yields numbers of one split without end, with repetitions."""
    while True:
        number = rng.randint(LOWEST, HIGHEST)
        if is_held_out(str(number)) == (split == "test"):
            yield number


def draw_imitations(seed: int, *, language: Language) -> Iterator[tuple[str, str]]:
    """Yields (problem, completion) of the train split without end, for the warm start."""
    rng = random.Random(seed)
    for number in draw_numbers("train", rng):
        words = say_words(language, rng)
        answer = say_answer(language, rng, words, str(number)[0])
        yield QUESTION.format(number), write_completion(words, answer)


def problems(
    split: str,
    *,
    path: str | None,
    seed: Annotated[int, AT_LEAST_0],
    num_train: Annotated[int, NUM_NUMBERS],
    num_eval: Annotated[int, NUM_NUMBERS],
    language: Language,
) -> list[Problem]:
    """Makes distinct problems of one split, the same for the same seed everywhere.

    Raises:
        ConfigError: a path, or an unknown split.
    """
    check_made(split, path)
    count = num_eval if split == "test" else num_train
    drawn = itertools.islice(draw_numbers(split, random.Random(seed)), 4 * count + 100)
    return [_to_problem(number, language) for number in itertools.islice(dict.fromkeys(drawn), count)]


def _to_problem(number: int, language: Language) -> Problem:
    digit = str(number)[0]
    demonstration = write_completion(say_words(language, random.Random(number)), digit)
    return Problem(f"keywords/{number}", QUESTION.format(number), digit, demonstration=demonstration)
