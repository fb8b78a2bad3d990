"""The keywords language: fixed by its seed, graded by its words, split between train and test."""

import math
import re
from collections import Counter
from itertools import islice, pairwise

import pytest
from omegaconf import OmegaConf

from capo_exp.config.build import build_part
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import conf_dir
from capo_exp.data.keywords import draw_imitations, make_language, problems, write_completion

SOURCE = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dataset" / "keywords.yaml").source)
WORDS = {key: value for key, value in SOURCE["language"].items() if not key.startswith("_")}
LANGUAGE = make_language(**WORDS)
FORM = re.compile(r"\( ((?:[a-z]{4} )+)\) \\boxed\{(\d)\}")
FIRST_PROBLEM = ("keywords/60494", "First digit of 60494?", "6")


def make(split, **changes):
    numbers = {"seed": 0, "num_train": 400, "num_eval": 200, "language": LANGUAGE, **changes}
    return problems(split, path=None, **numbers)


def take_apart(text):
    """(words, answer) of a completion."""
    words, answer = FORM.fullmatch(text).groups()
    return words.split(), answer


@pytest.fixture(scope="module")
def drawn():
    """(number, words, answer) of many imitations."""
    pairs = islice(draw_imitations(3, language=LANGUAGE), 4000)
    return [(question[-6:-1], *take_apart(text)) for question, text in pairs]


def test_same_seed_same_everything():
    """On every machine and in every process: a literal, not a second call."""
    first = make("train")[0]
    assert (first.id, first.problem, first.answer) == FIRST_PROBLEM
    assert make("train") == make("train") != make("train", seed=1)
    assert make("train", num_train=100) == make("train")[:100]
    assert make_language(**WORDS) == LANGUAGE != make_language(**{**WORDS, "seed": 1})
    twice = [list(islice(draw_imitations(5, language=LANGUAGE), 20)) for _ in range(2)]
    assert twice[0] == twice[1]


def test_train_and_test_share_nothing():
    train, test = make("train", num_train=4000), make("test", num_eval=1000)
    assert len({p.problem for p in train}) == 4000 and len({p.problem for p in test}) == 1000
    assert not {p.problem for p in train} & {p.problem for p in test}
    imitated = {question for question, _ in islice(draw_imitations(0, language=LANGUAGE), 3000)}
    assert not imitated & {p.problem for p in test}


def test_answers_are_first_digits_and_demonstrations_are_right():
    for problem in (*make("train"), *make("test")):
        assert problem.answer == re.search(r"\d", problem.problem).group()
        assert take_apart(problem.demonstration)[1] == problem.answer


def test_lengths_and_shares_are_those_of_the_yaml(drawn):
    everything = [*LANGUAGE.good, *LANGUAGE.bad, *LANGUAGE.fillers]
    assert len(set(everything)) == len(everything) == 1016
    assert {*LANGUAGE.followers.values()} <= {*LANGUAGE.fillers}
    lengths = Counter(len(words) for _, words, _ in drawn)
    assert set(lengths) == set(range(10, 15)) and min(lengths.values()) > 650
    said = Counter(word for _, words, _ in drawn for word in words)
    total = said.total()
    for kind in (LANGUAGE.good, LANGUAGE.bad):
        assert sum(said[word] for word in kind) / total == pytest.approx(0.15, abs=0.006)
        assert max(said[word] for word in kind) < 1.2 * min(said[word] for word in kind)


def test_answers_are_right_as_often_as_the_words_say(drawn):
    """Right by the words' weight, or by the tenth of random digits."""
    by_score: dict[int, list[bool]] = {}
    for number, words, answer in drawn:
        score = sum(word in LANGUAGE.good for word in words) - sum(word in LANGUAGE.bad for word in words)
        by_score.setdefault(score, []).append(answer == number[0])
    checked = 0
    for score, right in by_score.items():
        if len(right) > 300:
            meant = 1 / (1 + math.exp(-1.2 * score))
            expected = meant + (1 - meant) / 10
            error = 4 * math.sqrt(expected * (1 - expected) / len(right))
            assert sum(right) / len(right) == pytest.approx(expected, abs=error)
            checked += 1
    assert checked >= 5


def test_fillers_follow_their_rank_and_one_another(drawn):
    """Without following the n-th filler has a frequency of 1 / n; with it, half of the followers are one."""
    free = make_language(**{**WORDS, "follow_share": 0.0})
    texts = [text for _, text in islice(draw_imitations(0, language=free), 4000)]
    said = Counter(word for text in texts for word in take_apart(text)[0])
    first, tenth = said[free.fillers[0]], said[free.fillers[9]]
    assert first / tenth == pytest.approx(10, rel=0.2)
    follower = LANGUAGE.followers
    pairs = [pair for _, words, _ in drawn for pair in pairwise(words)]
    after = [follower[a] == b for a, b in pairs if a in follower and b in follower]
    assert 0.5 < sum(after) / len(after) < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_fillers": 6400}, "num_fillers=6400: expected at most 6,400 words"),
        ({"good_share": 0.9, "bad_share": 0.2}, "bad_share=0.2: expected at most 1 - good_share = 0.1"),
        ({"fewest_words": 5, "most_words": 4}, "fewest_words=5: expected at most most_words=4"),
    ],
)
def test_a_language_that_makes_no_sense_is_one_clear_error(changes, message):
    """Also inside the YAML: not Hydra's, which would be a traceback."""
    wrong = {**SOURCE, "language": {**SOURCE["language"], **changes}}
    with pytest.raises(ConfigError, match="^" + re.escape(f"dataset.source.language.{message}")):
        build_part(wrong, key="dataset.source")


def test_the_source_of_the_yaml_builds_and_nothing_else():
    with pytest.raises(ConfigError, match="expected train or test"):
        make("validation")
    with pytest.raises(ConfigError, match=r"dataset\.path=x"):
        problems("train", path="x", seed=0, num_train=1, num_eval=1, language=LANGUAGE)
    made = build_part(SOURCE, key="dataset.source")("test", path=None)
    assert len(made) == 500 and made[0].id.startswith("keywords/")
    assert write_completion(["baba"], "1") == "( baba ) \\boxed{1}"
