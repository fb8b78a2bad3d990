"""Problem sets from files and from the hub; every bad input is one line that names the key to change."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo_exp.config.build import build_part
from capo_exp.data.files import read_splits
from capo_exp.data.math_problems import ProblemSet, read_last_box, to_problems
from capo_exp.data.multiple_choice import ASK, letter_choices
from capo_exp.data.rows import Table
from tests.grading_pieces import SHARED, needs_data
from tests.pieces import one_line

BENCHMARKS = {"math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "minerva": 272, "olympiadbench": 675}
OWN_ROWS = [
    {"id": "m/0", "problem": "1+1?", "answer": "2", "solution": r"\boxed{2}", "level": "Level 1",
     "type": "Algebra"},
    {"id": "m/1", "problem": "2+2?", "answer": "4", "solution": r"\boxed{4}", "level": None, "type": None},
]  # fmt: skip
TWO_BOXES = r"\boxed{1}, no, \boxed{\frac{3}{2}}"
HUB_MATH_ROWS = [
    {"problem": r"$\frac{1}{2}+1$?", "solution": TWO_BOXES, "level": "Level 2", "type": "A"},
    {"problem": "Lost?", "solution": "The box is missing.", "level": "Level ?", "type": "B"},
]
HUB_GSM8K_ROWS = [{"question": "300*4?", "answer": "300*4=<<300*4=1200>>1200\n#### 1,200"}]
MATH_COLUMNS = {"answer": "solution", "demonstration": "solution", "level": "level", "family": "type"}
math = ProblemSet(
    name="math", hub_id="DigitalLearningGmbH/MATH-lighteval", hub_config="default", hub_revision="abc",
    columns={"problem": "problem", **MATH_COLUMNS}, answer_format="last_boxed",
)  # fmt: skip
gsm8k = ProblemSet(
    name="gsm8k",
    hub_id="openai/gsm8k",
    hub_config="main",
    hub_revision=None,
    columns={"problem": "question", "answer": "answer", "demonstration": "answer"},
    answer_format="after_hashes",
)


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    monkeypatch.delenv("CAPO_DATA_DIR", raising=False)


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def refuse(source, path, split="train"):
    return one_line(lambda: source(split, path=path and str(path)))


def answer_from_hub(monkeypatch, rows):
    """The hub then has these rows; returns a list that takes what it is asked for."""
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_directory_with_folders_comes_before_plain_split_file(tmp_path):
    write(tmp_path / "train.parquet", OWN_ROWS[1:])
    assert [p.id for p in math("train", path=str(tmp_path))] == ["m/1"]
    write(tmp_path / "math" / "train.parquet", OWN_ROWS)
    found = math("train", path=str(tmp_path))
    assert [p.id for p in found] == ["m/0", "m/1"]
    first, second = found
    assert (first.problem, first.answer, first.level, first.family) == ("1+1?", "2", "Level 1", "Algebra")
    assert first.demonstration == r"\boxed{2}"
    assert (second.level, second.family) == ("", "")


def test_a_file_itself_and_the_environment_variable(tmp_path, monkeypatch):
    file = write(tmp_path / "any.parquet", OWN_ROWS)
    assert len(math("train", path=str(file))) == 2
    write(tmp_path / "data" / "math" / "test.parquet", OWN_ROWS[:1])
    monkeypatch.setenv("CAPO_DATA_DIR", str(tmp_path / "data"))
    assert len(math("test", path=None)) == 1
    assert len(math("test", path=str(file))) == 2


def test_a_file_may_have_the_columns_of_the_hub(tmp_path):
    write(tmp_path / "gsm8k" / "train.parquet", HUB_GSM8K_ROWS)
    (only,) = gsm8k("train", path=str(tmp_path))
    assert (only.id, only.problem, only.answer) == ("gsm8k/train/0", "300*4?", "1200")


def test_rows_that_are_broken_or_without_answer_are_dropped_and_keep_the_ids_of_the_others(tmp_path):
    rows = [{"problem": f"{i}?", "answer": str(i), "broken": i == 1} for i in range(4)]
    rows[2]["answer"] = " "
    write(tmp_path / "train.parquet", rows)
    assert [p.id for p in math("train", path=str(tmp_path))] == ["math/train/0", "math/train/3"]


def test_what_cannot_be_read_is_named_with_the_key_to_change(tmp_path, monkeypatch):
    text = refuse(math, tmp_path / "nowhere")
    assert f"got dataset.path={tmp_path / 'nowhere'} which does not exist" in text
    assert "expected a directory with math/train.parquet or train.parquet" in text
    assert "set dataset.path or CAPO_DATA_DIR" in text
    assert "without such a file" in refuse(math, tmp_path)
    monkeypatch.setenv("CAPO_DATA_DIR", str(tmp_path))
    assert f"got CAPO_DATA_DIR={tmp_path} without such a file" in refuse(math, None)
    monkeypatch.delenv("CAPO_DATA_DIR")
    assert "dataset.path=null and no CAPO_DATA_DIR" in refuse(replace(math, hub_id=None), None)
    (tmp_path / "train.parquet").write_text("not\nparquet")
    text = refuse(math, tmp_path)
    assert re.search(r"train\.parquet \(.*\), expected a parquet file; change dataset\.path", text)
    write(tmp_path / "train.parquet", [{"question": "?", "answer": "1"}])
    text = refuse(math, tmp_path)
    assert "with columns answer, question, expected also level, problem, solution, type" in text
    assert "change dataset.path or dataset.source.columns" in text


def test_bad_settings_name_their_key(tmp_path):
    text = refuse(replace(math, columns={"problem": "problem"}), tmp_path)
    assert "dataset.source.columns=problem: expected problem, answer and any of" in text


def test_other_ways_of_writing_the_answer(tmp_path):
    cells = (["1/2", r" \frac12 ", "0.5", "1/2", ""], None)
    rows = [{"problem": f"{i}?", "answer": "0.5", "answers_alt": cell} for i, cell in enumerate(cells)]
    write(tmp_path / "train.parquet", rows)
    first, second = math("train", path=str(tmp_path))
    assert first.golds == ("0.5", "1/2", r"\frac12") and second.golds == ("0.5",)
    mapped = {"problem": "q", "answer": "a", "answers_alt": "others"}
    write(tmp_path / "train.parquet", [{"q": "?", "a": r"\boxed{1}", "others": ["1.0"]}])
    assert replace(math, columns=mapped)("train", path=str(tmp_path))[0].golds == ("1", "1.0")


@pytest.mark.parametrize(
    ("cells", "answers"),
    [
        ([7, None, 9], ["7", "9"]), ([27.0, float("nan"), None, 0.5], ["27", "0.5"]),
        ([1e16, -3.0, float("inf")], ["10000000000000000", "-3"]),
        ([["1", "2"], ["3"], [], None], ["1, 2", "3"]), ([True], ["true"]),
        ([{"value": "1"}, {"value": "2"}], None), ([b"1", b"2"], None), ([None, None], None), ([], None),
    ],
)  # fmt: skip
def test_answers_that_are_no_text(tmp_path, cells, answers):
    rows = [{"problem": f"{i}?", "answer": cell} for i, cell in enumerate(cells)]
    empty = pa.schema({"problem": pa.string(), "answer": pa.string()}).empty_table()
    pq.write_table(pa.Table.from_pylist(rows) if rows else empty, tmp_path / "train.parquet")
    if answers is None:
        assert re.match(r"got (no usable row of \d in|a cell with ({'value'|b'1'))", refuse(math, tmp_path))
        return
    found = math("train", path=str(tmp_path))
    assert [p.answer for p in found] == answers and found.rows == len(cells)


def test_two_rows_with_one_id(tmp_path):
    write(tmp_path / "train.parquet", [OWN_ROWS[0], OWN_ROWS[1], OWN_ROWS[0] | {"problem": "3+3?"}])
    assert re.search(r"got 2 problems with the id m/0 in .*, expected each id once", refuse(math, tmp_path))


def test_text_that_is_no_unicode(tmp_path):
    """JSON can hold half of a surrogate pair, a parquet file bytes that are no UTF-8."""
    rows = [{"problem": q, "answer": "1"} for q in ("a\ud800?", "b?", "c\x00\x1b\u202e?")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [(_, read)] = read_splits(str(tmp_path / "rows.jsonl"), "dataset.path").items()
    found = to_problems(Table(read, "rows"), {"problem": "problem", "answer": "answer"}, str, "x")
    assert [p.problem for p in found] == ["b?", "c\x00\x1b\u202e?"] and found.rows == 3
    broken = pa.array([b"\xff\xfe?"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"problem": broken, "answer": ["1"]}), tmp_path / "train.parquet")
    assert re.search(r"train\.parquet \(.*utf-8.*\), expected a parquet file", refuse(math, tmp_path))


GPQA_ROWS = [
    {
        "Record ID": f"rec{i}", "Question": f" {i}? \n", "Correct Answer": f"right {i}\n",
        "Incorrect Answer 1": "x", "Incorrect Answer 2": " y", "Incorrect Answer 3": "z" if i != 5 else None,
        "High-level domain": "Physics",
    }
    for i in range(40)
]  # fmt: skip
WRONG = ["Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
gpqa = ProblemSet(
    name="gpqa", hub_id=None, hub_config=None, hub_revision=None,
    columns={
        "id": "Record ID",
        "problem": "Question",
        "answer": "Correct Answer",
        "family": "High-level domain",
    },
    answer_format="plain", choices=partial(letter_choices, wrong=WRONG, seed=0),
)  # fmt: skip


def test_choices_have_letters_and_the_right_one_is_the_answer(tmp_path):
    write(tmp_path / "test.parquet", GPQA_ROWS)
    found = gpqa("test", path=str(tmp_path))
    assert found.rows == 40 and len(found) == 39  # one lacks a choice
    assert {p.id for p in found} == {f"rec{i}" for i in range(40)} - {"rec5"}
    for p in found:
        asked, empty, *choices, last, ask = p.problem.split("\n")
        assert (empty, last, ask, p.id, p.family) == ("", "", ASK, f"rec{asked[:-1]}", "Physics")
        assert [choice[:3] for choice in choices] == ["A) ", "B) ", "C) ", "D) "]
        assert {choice[3:] for choice in choices} == {f"right {asked[:-1]}", "x", "y", "z"}
        assert f"{p.answer}) right {asked[:-1]}" in choices
    assert set(Counter(p.answer for p in found)) == set("ABCD")


def test_the_order_of_choices_depends_on_the_seed_and_the_row_alone(tmp_path):
    write(tmp_path / "test.parquet", GPQA_ROWS)
    answers = [p.answer for p in gpqa("test", path=str(tmp_path))]
    assert [p.answer for p in gpqa("test", path=str(tmp_path))] == answers
    other = partial(letter_choices, wrong=WRONG, seed=1)
    assert [p.answer for p in replace(gpqa, choices=other)("test", path=str(tmp_path))] != answers
    write(tmp_path / "test.parquet", GPQA_ROWS[:3])
    assert [p.answer for p in gpqa("test", path=str(tmp_path))] == answers[:3]
    assert "".join(answers[:7]) == "AABCBAA"  # what a score depends on stays the same on every machine


def test_multiple_choice_without_its_columns(tmp_path):
    write(tmp_path / "test.parquet", [{k: v for k, v in GPQA_ROWS[0].items() if k != "Incorrect Answer 2"}])
    text = refuse(gpqa, tmp_path, "test")
    assert "dataset.source.choices.wrong=" in text and "expected columns of the wrong choices among" in text
    assert "choices.wrong=[]: exp" in refuse(
        replace(gpqa, choices=partial(letter_choices, wrong=[], seed=0)), tmp_path, "test"
    )
    write(tmp_path / "test.parquet", [{k: v for k, v in GPQA_ROWS[0].items() if k != "Question"}])
    assert "expected also Question" in refuse(gpqa, tmp_path, "test")


def test_hub_rows_are_mapped(monkeypatch):
    asked = answer_from_hub(monkeypatch, HUB_MATH_ROWS)
    (only,) = math("train", path=None)
    assert only.id == "math/train/0" and only.demonstration == TWO_BOXES
    assert (only.answer, only.level, only.family) == (r"\frac{3}{2}", "Level 2", "A")
    assert asked == [
        (("DigitalLearningGmbH/MATH-lighteval", "default"), {"split": "train", "revision": "abc"})
    ]
    assert read_last_box(r"so \boxed 2.") == "2"


def test_the_hub_may_call_a_split_otherwise_and_an_open_revision_is_said(monkeypatch):
    asked = answer_from_hub(monkeypatch, HUB_GSM8K_ROWS)
    found = replace(gsm8k, hub_split="train")("test", path=None)
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": None})]
    assert [(p.id, p.problem, p.answer) for p in found] == [("gsm8k/test/0", "300*4?", "1200")]
    assert found.note == (
        "openai/gsm8k: no commit is pinned (dataset.source.hub_revision=null), these are today's data"
    )
    assert replace(gsm8k, hub_revision="abc")("test", path=None).note == ""
    answer_from_hub(monkeypatch, OWN_ROWS)
    text = refuse(gsm8k, None)
    assert re.search(r"got hub dataset openai/gsm8k with columns .* expected also question", text)


def test_hub_that_cannot_be_reached(monkeypatch):
    """The library reads HF_HUB_OFFLINE when it is imported, so its own switch is set too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    text = refuse(replace(gsm8k, hub_id="openai/gsm8k-not-cached-here"), None)
    assert "got no train split of openai/gsm8k-not-cached-here from the hub (" in text
    assert "set dataset.path or CAPO_DATA_DIR" in text


HUB_COLUMNS = {
    "math500": "problem, solution, answer, subject, level, unique_id",
    "aime24": "id, problem, solution, answer, url, year",
    "aime25": "problem, answer",
    "amc23": "question, answer",
    "minerva": "question, answer",
    "olympiadbench": "question, final_answer",
    "gpqa": "Record ID, Question, Correct Answer, Incorrect Answer 1, Incorrect Answer 2, "
    "Incorrect Answer 3, High-level domain",
}
"""As far as public programs that read them tell."""


@pytest.mark.parametrize("dataset", (*BENCHMARKS, "gpqa"))
def test_benchmarks_are_pinned_read_the_hubs_columns_and_nothing_trains_on_them(
    dataset, composed, monkeypatch
):
    config = composed(f"dataset={dataset}")
    assert config.dataset.train_split is None and config.dataset.eval_split == "test"
    assert config.reward.name == "math_verify"
    source = config.dataset.source
    pinned = re.fullmatch("[0-9a-f]{40}", source["hub_revision"] or "")
    assert bool(pinned) == (dataset != "olympiadbench")  # no commit of that copy is known to us
    row = {column: f"text of {column}" for column in HUB_COLUMNS[dataset].split(", ")}
    asked = answer_from_hub(monkeypatch, [row])
    (only,) = build_part(source, key="dataset.source")("test", path=None)
    assert only.problem.lower().startswith(("text of problem", "text of question")) and only.answer
    names, options = asked[0]
    assert names == (source["hub_id"], source["hub_config"]) and options["revision"] == source["hub_revision"]
    assert options["split"] == ("train" if dataset in ("aime24", "aime25", "gpqa") else "test")


def test_dataset_brings_its_reward_and_the_command_line_wins(composed):
    for overrides, reward in ((["dataset=math"], "math_verify"), (["reward=exact", "dataset=math"], "exact")):
        assert composed("algo=grpo", *overrides).reward.name == reward


@needs_data
def test_real_benchmarks(composed):
    for dataset, count in BENCHMARKS.items():
        config = composed(f"dataset={dataset}").dataset
        found = build_part(config.source, key="dataset.source")(config.eval_split, path=str(SHARED))
        assert len(found) == len({p.id for p in found}) == found.rows == count
        assert all(p.problem and p.answer for p in found)
        assert sum(bool(p.answers_alt) for p in found) == (136 if dataset == "minerva" else 0)


@needs_data
@pytest.mark.parametrize(("source", "split", "count"), [(math, "test", 5000), (gsm8k, "test", 1319)])
def test_real_sets(source, split, count, tmp_path):
    """The same questions in the hub's columns give the same problems: answers are taken from solutions."""
    found = source(split, path=str(SHARED))
    assert len(found) == len({p.id for p in found}) == count
    assert all(p.problem and p.answer and p.demonstration for p in found)
    if source is math:
        assert Counter(p.level for p in found).keys() >= {f"Level {i}" for i in range(1, 6)}
        assert len({p.family for p in found}) == 7
    asked, told = ("problem", "solution") if source is math else ("question", "answer")
    rows = [{asked: p.problem, told: p.demonstration, "level": p.level, "type": p.family} for p in found]
    write(tmp_path / f"{split}.parquet", rows)
    assert [p.answer for p in source(split, path=str(tmp_path))] == [p.answer for p in found]
