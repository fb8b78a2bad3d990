"""dataset=sums, max_of_three, word_problems: right answers, fixed by the seed, splits apart."""

import re

import pytest

from capo_exp.config.build import build_part
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.data.questions import KINDS, problems

NUMBERS = {"path": None, "seed": 0, "num_train": 2200, "num_eval": 200}


def solved(kind, text):
    """The answer, worked out from the words alone."""
    a, b, c = ([*map(int, re.findall(r"\d+", text)), 0])[:3]
    if kind == "sums":
        return a + b
    if kind == "max_of_three":
        return max(a, b, c)
    start = a * b if "boxes" in text else a + b
    return start + c if "finds" in text else start - c


@pytest.mark.parametrize("kind", KINDS)
def test_problems_of_a_kind(kind, composed):
    config = composed(f"dataset={kind}", "model=smollm2_135m")
    check(config)
    assert config.reward.name == "last_number" and config.dataset.apply_chat_template
    made = {
        split: build_part(config.dataset.source, key="dataset.source")(split, path=None)
        for split in ("train", "test")
    }
    assert {split: len(found) for split, found in made.items()} == {"train": 2200, "test": 200}
    every = made["train"] + made["test"]
    assert len({one.problem for one in every}) == len({one.id for one in every}) == 2400
    assert all(int(one.answer) == solved(kind, one.problem) >= 0 for one in every)
    fewer = problems("test", kind=kind, **(NUMBERS | {"num_train": 10}))
    other = problems("test", kind=kind, **(NUMBERS | {"seed": 1}))
    assert fewer == made["test"] != other


@pytest.mark.parametrize(
    ("split", "changes", "named"),
    [
        ("dev", {}, "train_split"),
        ("train", {"path": "x"}, "dataset.path"),
        ("train", {"kind": "sum"}, "sums"),
        ("train", {"num_train": 8000}, "num_train"),
    ],
)
def test_wrong_input_is_named(split, changes, named):
    with pytest.raises(ConfigError, match=named):
        problems(split, **({"kind": "sums"} | NUMBERS | changes))


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("94 + 85 = 179.", "correct"),
        ("The answer is **179**", "correct"),
        ("It is 1,179", "wrong"),
        ("It is -179", "wrong"),
        ("It is 179.5", "wrong"),
        ("179 and then 5", "wrong"),
        ("To calculate 94 + 85 as", "wrong"),  # what a run on real weights was rewarded for by math_verify
        ("A sum", "no_answer"),
    ],
)
def test_only_the_number_is_rewarded_and_not_the_question(completion, reason, composed):
    with build_part(
        composed("dataset=sums", "model=smollm2_135m").reward.verifier, key="reward"
    )() as verifier:
        result = verifier.score([[completion]], [("179",)])
    assert result.grades[0][0].reason == reason and result.rewards == [[float(reason == "correct")]]
