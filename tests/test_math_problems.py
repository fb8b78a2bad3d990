"""Problem sets from files and from the hub; every bad input is one line that names the key to change."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo_exp import parts
from capo_exp.config import ConfigError
from capo_exp.data.math_problems import problems

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CAPO_DATA_DIR", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="neither CAPO_DATA_DIR nor ../shared/data")

OWN_ROWS = [
    {
        "id": "m/0",
        "problem": "1+1?",
        "answer": "2",
        "solution": r"\boxed{2}",
        "level": "Level 1",
        "type": "Algebra",
    },
    {"id": "m/1", "problem": "2+2?", "answer": "4", "solution": r"\boxed{4}", "level": None, "type": None},
]
HUB_MATH_ROWS = [
    {
        "problem": r"$\frac{1}{2}+1$?",
        "solution": r"\boxed{1}, no, \boxed{\frac{3}{2}}",
        "level": "Level 2",
        "type": "A",
    },
    {"problem": "Lost?", "solution": "The box is missing.", "level": "Level ?", "type": "B"},
]
HUB_GSM8K_ROWS = [{"question": "300*4?", "answer": "300*4=<<300*4=1200>>1200\n#### 1,200"}]

math = partial(
    problems,
    name="math",
    hub_id="DigitalLearningGmbH/MATH-lighteval",
    hub_config="default",
    hub_revision="abc",
    columns={
        "problem": "problem",
        "answer": "solution",
        "demonstration": "solution",
        "level": "level",
        "family": "type",
    },
    answer_format="last_boxed",
)
gsm8k = partial(
    problems,
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


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- files ---


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


def test_numbers_become_text(tmp_path):
    write(tmp_path / "train.parquet", [{"problem": "?", "answer": 7, "level": 3}])
    (only,) = math("train", path=str(tmp_path))
    assert (only.answer, only.level) == ("7", "3")


def test_missing_directory_and_missing_split(tmp_path):
    with pytest.raises(ConfigError) as error:
        math("train", path=str(tmp_path / "nowhere"))
    text = one_line(error)
    assert f"got dataset.path={tmp_path / 'nowhere'} which does not exist" in text
    assert "expected a directory with math/train.parquet or train.parquet" in text
    assert "set dataset.path or CAPO_DATA_DIR" in text
    with pytest.raises(ConfigError, match="without such a file") as error:
        math("train", path=str(tmp_path))
    one_line(error)


def test_environment_variable_is_named_when_it_is_the_wrong_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPO_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=f"got CAPO_DATA_DIR={tmp_path} without such a file") as error:
        math("train", path=None)
    one_line(error)


def test_unreadable_file(tmp_path):
    (tmp_path / "train.parquet").write_text("not\nparquet")
    with pytest.raises(
        ConfigError, match=r"train\.parquet \(.*\), expected a parquet file; change dataset\.path"
    ) as error:
        math("train", path=str(tmp_path))
    one_line(error)


def test_missing_column(tmp_path):
    write(tmp_path / "train.parquet", [{"question": "?", "answer": "1"}])
    with pytest.raises(ConfigError) as error:
        math("train", path=str(tmp_path))
    text = one_line(error)
    assert "with columns answer, question, expected also level, problem, solution, type" in text
    assert "change dataset.path or dataset.source.columns" in text


def test_empty_set_and_set_without_any_answer(tmp_path):
    schema = pa.schema({"problem": pa.string(), "answer": pa.string()})
    pq.write_table(schema.empty_table(), tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", HUB_MATH_ROWS[1:])
    for split, count in (("train", 0), ("test", 1)):
        with pytest.raises(
            ConfigError, match=f"got no usable row of {count} .* change dataset.path or"
        ) as error:
            math(split, path=str(tmp_path))
        one_line(error)


def test_bad_settings_name_their_key(tmp_path):
    with pytest.raises(
        ConfigError, match="answer_format=boxed, expected one of plain, last_boxed, after_hashes"
    ):
        math("train", path=str(tmp_path), answer_format="boxed")
    with pytest.raises(ConfigError, match="columns for problem, expected problem, answer and any of"):
        math("train", path=str(tmp_path), columns={"problem": "problem"})
    with pytest.raises(ConfigError, match=r"dataset.path=null and no CAPO_DATA_DIR"):
        math("train", path=None, hub_id=None)


# --- the hub ---


def test_hub_rows_are_mapped(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(HUB_MATH_ROWS if "MATH" in args[0] else HUB_GSM8K_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (only,) = math("train", path=None)
    assert only.id == "math/train/0"
    assert (only.answer, only.level, only.family) == (r"\frac{3}{2}", "Level 2", "A")
    assert only.demonstration == HUB_MATH_ROWS[0]["solution"]
    (only,) = gsm8k("test", path=None)
    assert (only.problem, only.answer) == ("300*4?", "1200")
    assert asked == [
        (("DigitalLearningGmbH/MATH-lighteval", "default"), {"split": "train", "revision": "abc"}),
        (("openai/gsm8k", "main"), {"split": "test", "revision": None}),
    ]


def test_hub_without_the_columns(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(OWN_ROWS))
    with pytest.raises(
        ConfigError, match=r"got hub dataset openai/gsm8k with columns .* expected also question"
    ) as error:
        gsm8k("train", path=None)
    one_line(error)


def test_hub_that_cannot_be_reached(monkeypatch):
    """The library reads HF_HUB_OFFLINE when it is imported, so its own switch is set too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        gsm8k("train", path=None, hub_id="openai/gsm8k-not-cached-here")
    text = one_line(error)
    assert "got no train split of openai/gsm8k-not-cached-here from the hub (" in text
    assert "set dataset.path or CAPO_DATA_DIR" in text


# --- the configurations ---


@pytest.mark.parametrize("dataset", ["math", "gsm8k"])
def test_dataset_configuration_builds_and_reads_files(dataset, composed, tmp_path):
    write(tmp_path / dataset / "test.parquet", OWN_ROWS)
    config = composed("algo=grpo", f"dataset={dataset}", f"dataset.path={tmp_path}").dataset
    source = parts.build(config.source, key="dataset.source", runtime=("path",))
    assert [p.answer for p in source(config.eval_split, path=config.path)] == ["2", "4"]


@pytest.mark.parametrize(
    ("overrides", "reward"),
    [
        (["dataset=math"], "math_verify"),
        (["dataset=gsm8k"], "math_verify"),
        (["dataset=math", "reward=exact"], "exact"),
        (["reward=exact", "dataset=math"], "exact"),
        (["dataset=arithmetic"], "exact"),
        (["experiment=tiny/math"], "math_verify"),
        (["experiment=tiny/math", "reward=exact"], "exact"),
    ],
)
def test_dataset_brings_its_reward_and_the_command_line_wins(overrides, reward, composed):
    assert composed("algo=grpo", *overrides).reward.name == reward


# --- real sets ---


@needs_data
@pytest.mark.parametrize(
    ("source", "split", "count"),
    [(math, "train", 7498), (math, "test", 5000), (gsm8k, "train", 7473), (gsm8k, "test", 1319)],
)
def test_real_sets(source, split, count):
    found = source(split, path=str(SHARED))
    assert len(found) == len({p.id for p in found}) == count
    assert all(p.problem and p.answer and p.demonstration for p in found)
    if source is math:
        assert Counter(p.level for p in found).keys() >= {f"Level {i}" for i in range(1, 6)}
        assert len({p.family for p in found}) == 7


@needs_data
@pytest.mark.parametrize(("source", "name", "split"), [(math, "math", "test"), (gsm8k, "gsm8k", "test")])
def test_answers_taken_from_real_solutions_equal_the_answer_column(source, name, split, tmp_path):
    """The same questions in the hub's columns give the same problems."""
    own = source(split, path=str(SHARED))
    asked, told = ("question", "answer") if name == "gsm8k" else ("problem", "solution")
    rows = [{asked: p.problem, told: p.demonstration, "level": p.level, "type": p.family} for p in own]
    write(tmp_path / f"{split}.parquet", rows)
    from_solutions = source(split, path=str(tmp_path))
    assert [p.answer for p in from_solutions] == [p.answer for p in own]
