"""A made language in which many words each carry a little of the answer's chance to be right.

The question is which digit a number begins with. A completion is `( word word ... ) \\boxed{digit}`; its
words are good ones, bad ones and fillers. Where the warm start imitates, the answer is right with probability
sigmoid(sharpness (good words - bad words)) and else a random digit, so a model that has learned it is right
as often as its own words are good. Reinforcement has to move many tokens, each of little weight, and to leave
the delimiters alone. Fillers have Zipf frequencies, so that a large vocabulary has rare rows. Train and test
numbers are split by a stable hash.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Problem

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
TEST_SHARE = 1 / 8  # of all numbers; held out from train and from the warm start
LOWEST, HIGHEST = 10_000, 99_999


@dataclass(frozen=True)
class Language:
    """Its words, in order of frequency, and how completions are drawn."""

    good: Sequence[str]
    bad: Sequence[str]
    fillers: Sequence[str]
    followers: Sequence[str]
    """The filler that comes after each filler, where the one before decides."""
    good_share: float
    bad_share: float
    follow_share: float
    words: tuple[int, int]
    sharpness: float


def make_language(
    *,
    seed: int,
    num_keywords: int,
    num_fillers: int,
    good_share: float,
    bad_share: float,
    follow_share: float,
    fewest_words: int,
    most_words: int,
    sharpness: float,
) -> Language:
    """The language of a seed.

    Args:
        seed: of the words and of which filler follows which.
        num_keywords: good words; as many are bad.
        num_fillers: other words, the n-th with a frequency of 1 / n.
        good_share: probability that a word is a good one.
        bad_share: that it is a bad one.
        follow_share: probability that the filler before decides which filler comes.
        fewest_words: of a completion.
        most_words: of a completion.
        sharpness: of the step from wrong to right answers.

    Raises:
        ConfigError: more words than there are, or shares and lengths that make no sense.
    """
    total, room = 2 * num_keywords + num_fillers, len(SYLLABLES) ** 2
    if not (num_keywords >= 1 and num_fillers >= 1 and total <= room):
        raise ConfigError(
            f"got {num_keywords} keywords of each kind and {num_fillers} fillers, expected 1 or more of both "
            f"and {room:,} words at most; change dataset.source.language.num_*"
        )
    if min(good_share, bad_share, follow_share) < 0 or max(good_share + bad_share, follow_share) > 1:
        raise ConfigError(
            f"got shares {good_share}, {bad_share}, {follow_share}, expected 0 or more and good + bad "
            "at most 1; change dataset.source.language.*_share"
        )
    if not 1 <= fewest_words <= most_words:
        raise ConfigError(
            f"got {fewest_words} to {most_words} words, expected 1 or more and the fewest first; "
            "change dataset.source.language.fewest_words and most_words"
        )
    rng = random.Random(seed)
    chosen = rng.sample(["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)], total)
    fillers = chosen[2 * num_keywords :]
    return Language(
        good=chosen[:num_keywords],
        bad=chosen[num_keywords : 2 * num_keywords],
        fillers=fillers,
        followers=rng.choices(fillers, weights=_zipf(num_fillers), k=num_fillers),
        good_share=good_share,
        bad_share=bad_share,
        follow_share=follow_share,
        words=(fewest_words, most_words),
        sharpness=sharpness,
    )


class Speaker:
    """Draws completions of a language."""

    def __init__(self, language: Language, rng: random.Random) -> None:
        self._language = language
        self._rng = rng
        self._weights = list(itertools.accumulate(_zipf(len(language.fillers))))
        self._follower = dict(zip(language.fillers, language.followers, strict=True))

    def words(self) -> list[str]:
        """One completion's words."""
        said: list[str] = []
        for _ in range(self._rng.randint(*self._language.words)):
            said.append(self._word(said[-1] if said else ""))
        return said

    def answer(self, words: Sequence[str], digit: str) -> str:
        """The digit, with the probability that the words make; else any digit, which can be the same."""
        score = self._language.sharpness * score_of(self._language, words)
        return digit if self._rng.random() < 1 / (1 + exp(-score)) else str(self._rng.randrange(10))

    def _word(self, before: str) -> str:
        language, rng, draw = self._language, self._rng, self._rng.random()
        if draw < language.good_share:
            return rng.choice(language.good)
        if draw < language.good_share + language.bad_share:
            return rng.choice(language.bad)
        if before in self._follower and rng.random() < language.follow_share:
            return self._follower[before]
        return rng.choices(language.fillers, cum_weights=self._weights)[0]


def score_of(language: Language, words: Sequence[str]) -> int:
    """Good words minus bad words."""
    return sum((word in language.good) - (word in language.bad) for word in words)


def render(words: Sequence[str], answer: str) -> str:
    """A completion as text."""
    return f"( {' '.join(words)} ) \\boxed{{{answer}}}"


def question(number: int) -> str:
    """The problem as text."""
    return f"First digit of {number}?"


def held_out(number: int) -> bool:
    """True if the number belongs to the test split."""
    digest = hashlib.sha256(str(number).encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def numbers(split: str, rng: random.Random) -> Iterator[int]:
    """Endless numbers of one split, with repetitions."""
    if split not in ("train", "test"):
        raise ConfigError(
            f"got split {split!r}, expected train or test; change dataset.train_split/eval_split"
        )
    while True:
        if held_out(number := rng.randint(LOWEST, HIGHEST)) == (split == "test"):
            yield number


def imitations(seed: int, *, language: Language) -> Iterator[tuple[str, str]]:
    """Endless (problem, completion) of the train split, for the warm start."""
    rng = random.Random(seed)
    speaker = Speaker(language, rng)
    for number in numbers("train", rng):
        words = speaker.words()
        yield question(number), render(words, speaker.answer(words, str(number)[0]))


def problems(
    split: str, *, path: str | None, seed: int, num_train: int, num_eval: int, language: Language
) -> list[Problem]:
    """Distinct problems of one split, the same for the same seed everywhere.

    Raises:
        ConfigError: a path, an unknown split, or more problems than there are.
    """
    if path is not None:
        raise ConfigError(f"got dataset.path={path}, expected null: keywords problems are made, not read")
    count = num_eval if split == "test" else num_train
    room = 5000  # of the 11,000 that test has, so that drawing finds them soon
    if not 1 <= count <= room:
        raise ConfigError(
            f"got {count} {split} problems, expected 1 to {room:,}; change dataset.source.num_*"
        )
    drawn = itertools.islice(numbers(split, random.Random(seed)), 4 * count + 100)
    return [_problem(number, language) for number in itertools.islice(dict.fromkeys(drawn), count)]


def _problem(number: int, language: Language) -> Problem:
    digit = str(number)[0]
    demonstration = render(Speaker(language, random.Random(number)).words(), digit)
    return Problem(f"keywords/{number}", question(number), digit, demonstration=demonstration)


def _zipf(count: int) -> list[float]:
    return [1 / (rank + 1) for rank in range(count)]
