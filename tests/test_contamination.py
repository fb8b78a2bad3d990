"""From a source to the prompts of a run: what leaves the data, counted, and the order of the rest."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo_exp.config.errors import ConfigError
from capo_exp.core import policy
from capo_exp.core.types import Problem
from capo_exp.data.contamination import count_repeated, find_overlap, normalise
from capo_exp.data.prepare import choose_problems, prepare, read_split
from capo_exp.training import loop as train
from tests.grading_pieces import SHARED, needs_data
from tests.pieces import one_line


def problem(text, level="", family="", answer="1"):
    return Problem(text, text, answer, family, level)


def everything(golds):
    return [True] * len(golds)


@pytest.mark.parametrize(
    "other",
    [
        "Find $x$ if $x+1=2$ .",
        "find x if x + 1 = 2.",
        "Find $x$ if\n\n  $x + 1=2$.\t",
        r"Find $x$ if $x\,+\,1 \; = \: 2\!$.",
        r"Find \(x\) if \[x + 1 = 2\].",
        r"Find~$x$ if $x\quad+\qquad1=2$.",
        r"Find $x$ if $x \thinspace+\ 1=2\>$.",
        "Find $x$ if $x + 1 = \uff12$.",  # full width
        "Find\u00a0$x$\u2009if $x + 1 = 2$.",
    ],
)
def test_what_does_not_count(other):
    assert normalise(other) == normalise("Find $x$ if $x + 1 = 2$.")


def test_what_counts():
    """Among it a line break before a bracket, and a command whose name begins like a space."""
    for formula in ("$x + 1 = 3$.", "$x - 1 = 2$.", "$x + 1 = 2$", "$x + 1 = 20$.", r"$x \\+ 1 = 2$."):
        assert normalise(f"Find $x$ if {formula}") != normalise("Find $x$ if $x + 1 = 2$.")
    assert normalise(r"\\[2pt] \[a\]") == r"\\[2pt]a"
    assert normalise(r"\quadratic \quad \qquadx") == r"\quadratic\qquadx"


def test_overlap_of_either_side():
    train_set = [problem(text) for text in ("1+1?", "new", "1 + 1?", "2+2?")]
    evaluation = [problem(text) for text in ("2+2 ?", "$1+1$?", "other", "1+1?")]
    assert find_overlap(train_set, evaluation) == {0, 2, 3}
    assert find_overlap(evaluation, train_set) == {0, 1, 3}
    assert find_overlap(train_set, []) == find_overlap([], evaluation) == set()
    assert count_repeated(train_set) == count_repeated(evaluation) == 1


@pytest.mark.slow
@needs_data
def test_no_benchmark_is_in_the_training_data_but_three_problems_of_math_are(composed):
    """2948 and 4656 differ in the end of a line, the others in white space and the place of a dollar sign."""

    def read(name, split):
        return read_split(composed(f"dataset={name}", f"dataset.path={SHARED}").dataset, split)

    train_set, evaluation = read("math", "train"), read("math", "test")
    trained = {train_set[i].id for i in find_overlap(train_set, evaluation)}
    assert trained == {"math/train/750", "math/train/1414", "math/train/2948"}
    tested = {evaluation[i].id for i in find_overlap(evaluation, train_set)}
    assert tested == {"math/test/3023", "math/test/1038", "math/test/4656"}
    assert count_repeated(train_set) == 4 and count_repeated(evaluation) == 0
    assert len(find_overlap(read("math500", "test"), evaluation)) == 500
    for name in ("math500", "gsm8k", "aime24", "aime25", "amc23", "minerva", "olympiadbench"):
        assert find_overlap([*train_set, *read("gsm8k", "train")], read(name, "test")) == set()


SET = [
    problem("a", "Level 1", "Algebra"),
    problem("b", "Level 5", "Algebra"),
    problem("c", "Level 5", "Number Theory"),
    problem("d", "Level ?", "Geometry"),
    problem("e"),
]


@pytest.mark.parametrize(
    ("levels", "types", "kept"),
    [
        ([], [], "abcde"), (["5"], [], "bc"), (["level  5", "1"], [], "abc"), ([], ["algebra"], "ab"),
        (["5"], ["Algebra"], "b"),
    ],
)  # fmt: skip
def test_levels_and_types(levels, types, kept):
    assert "".join(found.id for found in choose_problems(SET, levels, types)) == kept


@pytest.mark.parametrize(
    ("levels", "types", "message"),
    [
        (["6"], [], "got dataset.levels=6, expected some of Level 1, Level 5, Level ?"),
        ([], ["Alg"], "got dataset.types=Alg, expected some of Algebra, Geometry, Number Theory"),
        (["1"], ["Geometry"], "which no problem has; expected a pair of Level 1 Algebra, Level"),
    ],
)
def test_unknown_and_empty_choices(levels, types, message):
    assert message in one_line(lambda: choose_problems(SET, levels, types))
    with pytest.raises(ConfigError, match=r"expected \[\], since this dataset states none"):
        choose_problems([problem("a")], ["1"], [])


TRAIN_ROWS = [
    {"problem": "1+1?", "answer": "2", "level": "Level 1"},
    {"problem": "1+2?", "answer": "3", "level": "Level 5"},
    {"problem": "", "answer": "4", "level": "Level 5"},
    {"problem": "1+4 ?", "answer": "5", "level": "Level 5"},
    {"problem": "1+5?", "answer": "6", "level": "Level 5"},
    {"problem": f"1+6{'0' * 80}?", "answer": "7", "level": "Level 5"},
    {"problem": "1+7?", "answer": "unreadable", "level": "Level 5"},
    {"problem": "1+5 ?", "answer": "6", "level": "Level 5"},
    {"problem": "1+8?", "answer": "9", "level": "Level 5"},
]
TEST_ROWS = [
    {"problem": "2+2?", "answer": "unreadable", "level": "Level 9"},
    {"problem": "2+3?", "answer": None, "level": "Level 9"},
    {"problem": f"2+4{'0' * 80}?", "answer": "6", "level": "Level 9"},
    {"problem": "2+5?", "answer": "7", "level": "Level 9"},
    {"problem": "$1+4$?", "answer": "unreadable", "level": "Level 9"},
]


@pytest.fixture
def made(composed, tmp_path):
    """A dataset of the rows above, for the tiny model."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    own = (
        "dataset=math", "prompt=plain", "reward=exact", f"dataset.path={folder}", "dataset.levels=[5]",
        "dataset.max_prompt_tokens=64", "dataset.max_completion_tokens=8", "evaluation.num_problems=2",
    )  # fmt: skip
    return lambda *overrides: composed(*own, *overrides)


def readable(golds):
    return ["unreadable" not in accepted for accepted in golds]


def test_each_row_is_counted_once_and_the_rest_keeps_its_order(made):
    config = made()
    data = prepare(config, policy.load_tokenizer(config.model), readable)
    assert [prompt.problem.id for prompt in data.train] == [f"math/train/{i}" for i in (1, 4, 7, 8)]
    assert [prompt.problem.id for prompt in data.held_out] == ["math/test/3", "math/test/0"]  # shuffled
    assert asdict(data.counts["training"]) == {
        "rows": 9, "unusable": 1, "filtered": 1, "contaminated": 1, "too_long": 1, "ungradable": 1,
        "repeated": 1, "kept": 4, "used": 4,
    }  # fmt: skip
    assert asdict(data.counts["evaluation"]) == {
        "rows": 5, "unusable": 1, "filtered": 0, "contaminated": 0, "too_long": 1, "ungradable": 1,
        "repeated": 0, "kept": 3, "used": 2,
    }  # fmt: skip
    assert data.lines() == [
        "training data: 9 rows, 1 unusable, 1 of other levels or types, 1 also in the evaluation data, "
        "1 too long, 1 ungradable; 4 kept, 1 of them repeated",
        "evaluation data: 5 rows, 1 unusable, 1 too long, 1 ungradable; 3 kept, the first 2 are asked",
    ]


def test_questions_with_special_tokens_are_said(made, monkeypatch):
    texts = ("a<|im_end|>?", "b?", "<|endoftext|>c?")
    rows = [{"problem": text, "answer": "1", "level": "5"} for text in texts]
    folder = Path(str(made().dataset.path))
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    data = prepare(made(), policy.load_tokenizer(made().model), everything)
    (note,) = data.notes
    assert note.startswith("2 questions hold the text of a special token") and data.lines()[-1] == note


def test_nothing_left_says_why(made, tmp_path):
    config = made("dataset.levels=[]")
    tokenizer = policy.load_tokenizer(config.model)
    with pytest.raises(ConfigError, match="none with an answer that the verifier can read; expected form"):
        prepare(config, tokenizer, lambda golds: [False] * len(golds))
    same = replace(config, dataset=replace(config.dataset, eval_split="train"))
    with pytest.raises(ConfigError, match="got 8 training problems, all of which are in the evaluation"):
        prepare(same, tokenizer, everything)
    with pytest.raises(ConfigError, match=r"dataset\.train_split=null: expected a dataset with") as error:
        prepare(made("dataset.train_split=null"), tokenizer, everything)
    assert "\n" not in str(error.value)


RUN = (
    "logger=files", "num_steps=4", "regime.prompts_per_step=3", "regime.group_size=2", "evaluation.every=0",
    "logger.completions_every=1", "logger.completions_groups=3",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_asks_what_is_left_and_the_counts_are_on_record(made, tmp_path, capsys):
    """Four steps of three prompts walk through the five that are left more than twice."""
    run = train.run(made(*RUN, f"output_dir={tmp_path / 'run'}"))
    printed = capsys.readouterr().out.splitlines()
    files = sorted((run / "completions").glob("step_*.parquet"))
    asked = [text for file in files for text in pq.read_table(file)["prompt"].to_pylist()]
    assert len(files) == 4 and {*asked} == {"1+2?\n", "1+5?\n", "1+5 ?\n", "1+8?\n", "1+7?\n"}
    record = json.loads((run / "run.json").read_text())
    assert record["first_prompt"] == "1+2?\n" and record["data_notes"] == []
    assert record["data_counts"]["training"]["contaminated"] == 1
    assert record["data_counts"]["evaluation"]["used"] == 2
    assert "prompt 1: 1+2?\\n => 3" in printed and not any(line.startswith("prompt 4") for line in printed)
