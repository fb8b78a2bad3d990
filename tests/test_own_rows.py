"""A user's own questions: every kind of file, its division into two parts, and each mistake in one line."""

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo_exp.config.checks import check, check_trains
from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Problem
from capo_exp.data.contamination import normalise
from capo_exp.data.files import READERS
from capo_exp.data.own_rows import divide
from capo_exp.data.prepare import read_split
from capo_exp.data.rows import Problems, read_hub
from tests.pieces import one_line

Rows = Sequence[dict[str, Any]]
ROWS = [{"q": f"What is {n}+{n}?", "a": f"0{2 * n}"} for n in range(20)]
WRITTEN = {
    "12345678901234567890.5": "12345678901234567890.5", "3.10": "3.10", "27.0": "27", "1e400": "1E+400",
    "7": "7", "0.1": "0.1", "1e3": "1000", "12345678901234567890123": "12345678901234567890123",
}  # fmt: skip
"""A number in JSON -> the answer that it becomes."""
COLUMNS = ("dataset=file", "dataset.source.columns.problem=q", "dataset.source.columns.answer=a")
datasets.disable_progress_bars()


def write_csv(file, rows, delimiter=","):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(file, rows, make=pa.ipc.new_stream):
    table = pa.Table.from_pylist(list(rows))
    with make(str(file), table.schema) as writer:
        writer.write_table(table)


def write_lines(file, rows):
    file.write_text("\n\n".join(map(json.dumps, rows)))


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.jsonl": write_lines,
    "lines.json": write_lines,
    "list.json": lambda file, rows: file.write_text(json.dumps(rows)),
    "rows.csv": write_csv,
    "rows.tsv": lambda file, rows: write_csv(file, rows, "\t"),
    "rows.parquet": lambda file, rows: pq.write_table(pa.Table.from_pylist(list(rows)), file),
    "stream.arrow": write_arrow,
    "file.arrow": lambda file, rows: write_arrow(file, rows, pa.ipc.new_file),
    "folder": lambda folder, rows: datasets.Dataset.from_list(list(rows)).save_to_disk(folder),
}


def read(config):
    """Both splits."""
    dataset = config.dataset
    assert dataset.train_split is not None
    return read_split(dataset, dataset.train_split), read_split(dataset, dataset.eval_split)


def asks(problems):
    return {(each.problem, each.answer) for each in problems}


def test_every_kind_of_file_holds_the_same_problems(composed, tmp_path):
    assert {Path(name).suffix for name in WRITERS} == {"", *READERS}
    for name, write in WRITERS.items():
        write(tmp_path / name, ROWS)
        train, held_out = read(config := composed(*COLUMNS, f"dataset.path={tmp_path / name}"))
        check(config)
        assert (len(train), len(held_out)) == (18, 2), name
        assert asks([*train, *held_out]) == {(row["q"], row["a"]) for row in ROWS}, name  # 02 stays 02


def test_answers_are_the_digits_that_are_written(composed, tmp_path):
    """Whatever the type: 3.1 of 32 bits is not 3.0999999, and JSON may hold more than float64 does."""
    lines = [f'{{"q": "Question {i}?", "a": {text}}}' for i, text in enumerate(WRITTEN)]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    (tmp_path / "n.json").write_text(f"[{','.join(lines)}]")
    (tmp_path / "b.jsonl").write_text('{"q": "Is 2 even?", "a": true}\n{"q": "Is 3 even?", "a": false}')
    found = {key: [*WRITTEN.values()] for key in ("n.jsonl", "n.json")} | {"b.jsonl": ["true", "false"]}
    for bits, kind, texts in (
        (32, np.float32, ["3.1", "0.1", "27", "1e-07"]),
        (16, np.float16, ["3.1", "0.1"]),
    ):
        answers = pa.array([kind(text) for text in texts])
        table = pa.table({"q": [f"Question {i}?" for i in range(len(texts))], "a": answers})
        pq.write_table(table, tmp_path / f"{bits}.parquet")
        with pa.ipc.new_file(str(tmp_path / f"{bits}.arrow"), table.schema) as writer:
            writer.write_table(table)
        datasets.Dataset(table).save_to_disk(tmp_path / f"{bits}")
        found |= {f"{bits}{ending}": texts for ending in (".parquet", ".arrow", "")}
    for name, texts in found.items():
        train, held_out = read(composed(*COLUMNS, f"dataset.path={tmp_path / name}"))
        in_order = sorted([*train, *held_out], key=lambda each: each.problem)
        assert [each.answer for each in in_order] == texts, name


def test_a_folder_with_splits_and_a_file_of_its_own_to_evaluate_on(composed, tmp_path):
    parts = {"train": ROWS[:5], "validation": ROWS[5:9]}
    both = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "splits")
    path = f"dataset.path={tmp_path / 'splits'}"
    train, held_out = read(composed(*COLUMNS, path, "dataset.eval_split=validation"))
    assert (len(train), len(held_out)) == (5, 4)
    with pytest.raises(ConfigError, match=r"got split test, .* has the splits train, validation"):
        read(composed(*COLUMNS, path))
    datasets.DatasetDict({"train": both["train"]}).save_to_disk(tmp_path / "one")  # is divided as a file is
    train, held_out = read(composed(*COLUMNS, f"dataset.path={tmp_path / 'one'}"))
    assert (len(train), len(held_out)) == (4, 1)
    write_lines(tmp_path / "eval.jsonl", ROWS[:3])
    write_lines(tmp_path / "train.jsonl", ROWS)
    own = f"dataset.source.eval_path={tmp_path / 'eval.jsonl'}"
    train, held_out = read(composed(*COLUMNS, f"dataset.path={tmp_path / 'train.jsonl'}", own))
    assert (len(train), len(held_out)) == (20, 3)  # what is in both, prepare leaves out of training


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2), st.floats(0.01, 0.8), st.integers(0, 9))
def test_no_question_is_in_both_parts(letters, fraction, seed):
    texts = [f"{letter} ?".upper() if i % 2 else f"{letter}?" for i, letter in enumerate(letters)]
    problems = [Problem(str(i), text, "1") for i, text in enumerate(texts)]
    found = Problems(problems, rows=len(texts) + 3, where="x")
    distinct = len(set(letters))
    count = max(1, round(fraction * distinct))
    if distinct <= count:
        with pytest.raises(
            ConfigError, match=f"got {distinct} different questions in x, too few to hold out"
        ):
            divide(found, "train", fraction, seed)
        return
    train, held_out = (divide(found, split, fraction, seed) for split in ("train", "test"))
    assert sorted(p.id for p in (*train, *held_out)) == sorted(p.id for p in problems)
    asked, kept_back = ({normalise(p.problem) for p in part} for part in (train, held_out))
    assert not asked & kept_back and len(kept_back) == count
    assert (train.rows - len(train), held_out.rows - len(held_out)) == (3, 0)
    random.Random(seed).shuffle(problems)  # the order of the file decides nothing
    shuffled = divide(Problems(problems, rows=0, where="x"), "test", fraction, seed)
    assert {p.id for p in shuffled} == {p.id for p in held_out}


def test_the_seed_chooses_what_is_held_out(composed, tmp_path):
    write_lines(tmp_path / "rows.jsonl", ROWS)
    path = f"dataset.path={tmp_path / 'rows.jsonl'}"
    chosen = [asks(read(composed(*COLUMNS, path, f"dataset.source.seed={seed}"))[1]) for seed in range(8)]
    assert len({frozenset(each) for each in chosen}) > 4
    half = read(composed(*COLUMNS, path, "dataset.source.eval_fraction=0.5"))
    assert (len(half[0]), len(half[1])) == (10, 10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.jsonl", None, r"^dataset.path=.*no.jsonl: expected a file or folder that exists"),
        ("x.txt", "", r"expected a file that ends in .jsonl, .json, .csv, .*, or a folder of save_to_disk"),
        ("x.jsonl", '{"q": "1", "a": "1"}\n\n{"q": "2", \n', r"jsonl line 3: Expecting .* at column \d"),
        ("x.jsonl", '{"q": "1", "a": "1"}\n[2]', r"x.jsonl line 2: \[2\]; expected one JSON object a line"),
        ("x.json", '[{"q": "1"}, 2]', r"x.json item 2: 2; expected an object"),
        ("x.json", "[1", r"^dataset.path=.*x.json: it cannot be read \(Expecting"),
        ("x.csv", "q,a\n1,2\n3,4,5\n", r"x.csv line 3: more cells than the 2 columns"),
        ("x.arrow", "no", r"^dataset.path=.*x.arrow: it cannot be read"),
        ("x.parquet", "no", r"expected a parquet file; change dataset.path"),
        ("x.jsonl", "", r"got no usable row of 0 in .*x.jsonl, expected questions with answers"),
        ("x.jsonl", '{"q": " ", "a": "1"}', r"got no usable row of 1 in .*x.jsonl"),
        ("x.jsonl", '{"question": "1", "a": "1"}', r"problem=q: no column of .*; expected one of a, ques"),
        ("x.jsonl", '{"q": "1", "a": "1"}\n{"q": "2", "a": 2}', r"answer=a: text in row 1 and a number in"),
        ("x.jsonl", '{"q": [{"content": "1"}], "a": "1"}', r"problem=q: a list in row 1; expected text"),
        ("x.jsonl", '{"q": "1", "a": {"value": 1}}', r"answer=a: a mapping in row 1; expected text"),
        ("x.jsonl", '{"q": "1", "a": [[1], [2]]}', r"^got a cell with \[\[1\], \[2\]\], expected text"),
        ("x.jsonl", '{"q": "1", "a": ["1", {"b": 2}]}', r"^got a cell with {'b': 2}, expected text"),
        ("x.jsonl", '{"q": "1", "a": 1, "a": 2}', r"jsonl line 1: the column a stands there twice; expected"),
        ("x.json", '[{"q": "1", "q": 2}]', r"x.json: the column q stands there twice; expected one of"),
        ("x.csv", "q,a,a\n1,2,3\n", r"x.csv: the column a stands there twice"),
        ("x.jsonl", '{"q": "$$", "a": "1"}', r"got no usable row of 1 in .*x.jsonl"),
        ("x.jsonl", f'{{"q": "1", "a": 1e{"9" * 30}}}', r"the exponent of 1e9+ is too large"),
        ("x.jsonl", '{"q": "1?", "a": "1"}\n{"q": "1 ?", "a": "1"}', r"got 1 different questions .*too few"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(name, text, message, composed, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    config = composed(*COLUMNS, f"dataset.path={tmp_path / name}")
    assert re.search(message, one_line(lambda: read(config)))


def test_a_cell_of_any_length_is_read(composed, tmp_path):
    write_csv(tmp_path / "x.csv", [{"q": "long " * 40_000, "a": "1"}, {"q": "short", "a": "2"}])
    problems, held_out = read(composed(*COLUMNS, f"dataset.path={tmp_path / 'x.csv'}"))
    assert len(problems) == len(held_out) == 1


def test_a_dataset_that_is_a_script_is_told(tmp_path):
    script = tmp_path / "scripted" / "scripted.py"
    script.parent.mkdir()
    script.write_text("")
    with pytest.raises(ConfigError, match=r"got no train split of .*scripts are no longer supported"):
        read_hub(str(script.parent), config=None, split="train", revision=None, expected="expected another")


def test_the_rows_to_train_on_stand_in_train_where_the_others_have_a_file(composed):
    apart = ("dataset=file", "dataset.path=a", "dataset.source.eval_path=b")
    check_trains(composed(*apart))
    with pytest.raises(ConfigError, match=r"dataset\.train_split=train_sft: expected train beside"):
        check_trains(composed(*apart, "dataset.train_split=train_sft"))


def test_questions_without_answers_are_for_a_reward_that_needs_none(composed, tmp_path):
    write_lines(tmp_path / "rows.jsonl", ROWS)
    keys = (*COLUMNS, f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.source.columns.answer=null")
    train, held_out = read(composed(*keys))
    assert {p.answer for p in (*train, *held_out)} == {""}
    with pytest.raises(ConfigError, match=r"dataset.path=null: expected your file, as in dataset.path="):
        read(composed("dataset=file"))
    with pytest.raises(ConfigError, match=r"dataset.source.columns=answer: expected problem and any of"):
        read(composed(*keys[:-1], "dataset.source.columns.problem=null"))


def test_the_hub_by_its_id_alone(composed, monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append((names, options["split"]))
        return datasets.Dataset.from_list([{"problem": f"{n}?", "answer": n} for n in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    check(config := composed("dataset=hub", "dataset.source.hub_id=org/name"))
    assert list(map(len, read(config))) == [20, 20]
    assert asked == [(("org/name", None), "train"), (("org/name", None), "test")]
    divided = composed("dataset=hub", "dataset.source.hub_id=org/name", "dataset.source.eval_fraction=0.25")
    assert list(map(len, read(divided))) == [15, 5] and asked[-1][1] == "train"
    with pytest.raises(
        ConfigError, match=r"hub_id=null: expected a dataset on the hub, as in dataset.source"
    ):
        read(composed("dataset=hub"))
