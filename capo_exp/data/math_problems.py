"""Problem sets with a known answer (MATH, GSM8K, ...): parquet files, or the Hugging Face hub."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Annotated, Any

from capo_exp.config.errors import ConfigError, error
from capo_exp.config.ranges import NAME, one_of
from capo_exp.core.types import Problem
from capo_exp.data.contamination import normalise
from capo_exp.data.rows import (
    DATA_DIR_VARIABLE,
    Problems,
    Rows,
    Table,
    expect_file,
    find_file,
    read_hub,
    read_parquet,
)
from capo_exp.grading.extract import find_last_box

OWN_COLUMNS = {"problem": "problem", "answer": "answer"}
"""Field of Problem -> column of this project's own parquet files."""
OWN_EXTRA_COLUMNS = {
    "id": "id",
    "demonstration": "solution",
    "level": "level",
    "family": "type",
    "answers_alt": "answers_alt",
}


def read_last_box(solution: str) -> str:
    r"""Returns the content of the last \boxed{...}, else the character that \boxed 2 boxes."""
    bare = re.findall(r"\\boxed\s+(\w)", solution)
    return find_last_box(solution) or (bare[-1] if bare else "")


ANSWER_FORMATS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "last_boxed": read_last_box,
    "after_hashes": lambda text: text.rpartition("####")[2].replace(",", "") if "####" in text else "",
}
"""How the answer stands in its column: alone, in the last box of a solution, or after #### as in 1,200."""


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """A problem set with known answers, and where it stands: `dataset.source` of math, gsm8k, gpqa, ..."""

    name: Annotated[str, NAME]
    """Its folder, and the prefix of ids where the source has none."""
    hub_id: str | None
    """Dataset on the hub; null if it is not there."""
    hub_config: str | None
    """The hub's name for a part of the dataset; null if it has none."""
    hub_revision: str | None
    """Commit on the hub; null = the newest."""
    hub_split: str | None = None
    """The hub's name of the split; null = the same."""
    columns: Mapping[str, str]
    """Field of Problem -> column on the hub. A file may have these columns too, or this project's own:
    problem, answer, and if wanted id, solution, level, type, answers_alt, broken."""
    answer_format: Annotated[str, one_of(*ANSWER_FORMATS)]
    """How the answer column holds the answer."""
    choices: Callable[[Rows, Mapping[str, str]], Rows] | None = None
    """Makes a multiple-choice question of each row; null = the rows are questions as they are."""

    def __call__(self, split: str, *, path: str | None) -> Problems:
        """Reads one split in the order of its source, without the rows that are flagged `broken`, lack
        question or answer, or hold text that cannot be written as UTF-8 (half of a surrogate pair).

        Args:
            split: name of the split, which is also the name of its file.
            path: a directory with <name>/<split>.parquet or <split>.parquet, or one parquet file, which then
                serves every split; null = the directory that CAPO_DATA_DIR names, or if it is unset the hub.

        Raises:
            ConfigError: nothing found, nothing readable, a column is missing, two rows have one id, or no row
                is left.
        """
        if not set(OWN_COLUMNS) <= set(self.columns) <= {*OWN_COLUMNS, *OWN_EXTRA_COLUMNS}:
            wanted = f"problem, answer and any of {', '.join(OWN_EXTRA_COLUMNS)}"
            raise error("dataset.source.columns", ", ".join(self.columns), wanted)
        file, prefix = find_file(split, path, self.name), f"{self.name}/{split}"
        if file is not None:
            table = Table(read_parquet(file), str(file))
            if set(OWN_COLUMNS.values()) <= table.columns:
                extra = {field: c for field, c in OWN_EXTRA_COLUMNS.items() if c in table.columns}
                return to_problems(table, OWN_COLUMNS | extra, str, prefix)
        else:
            expected = expect_file(self.name, split)
            if self.hub_id is None:
                raise ConfigError(f"got dataset.path=null and no {DATA_DIR_VARIABLE}, {expected}")
            config, revision, hub_split = self.hub_config, self.hub_revision, self.hub_split or split
            table = read_hub(
                self.hub_id, config=config, split=hub_split, revision=revision, expected=expected
            )
        missing = sorted({*self.columns.values()} - table.columns)
        if table.rows and missing:
            raise ConfigError(
                f"got {table.where} with columns {', '.join(sorted(table.columns))}, expected also "
                f"{', '.join(missing)} (or problem and answer in a file); change dataset.path or "
                "dataset.source.columns"
            )
        rows = self.choices(table.rows, self.columns) if self.choices else table.rows
        table = replace(table, rows=rows)
        return to_problems(table, self.columns, ANSWER_FORMATS[self.answer_format], prefix)


def to_problems(
    table: Table, columns: Mapping[str, str], answer_of: Callable[[str], str], prefix: str
) -> Problems:
    """Makes problems of the usable rows; raises as ProblemSet."""
    found = [
        _to_problem(row, columns, answer_of, f"{prefix}/{index}")
        for index, row in enumerate(table.rows)
        if not row.get("broken")
    ]
    kept = [problem for problem in found if _is_usable(problem, "answer" in columns)]
    if not kept:
        raise ConfigError(
            f"got no usable row of {len(table.rows)} in {table.where}, expected questions with answers; "
            "change dataset.path or dataset.source.answer_format"
        )
    name, count = Counter(problem.id for problem in kept).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"got {count} problems with the id {name} in {table.where}, expected each id once; "
            "change the file, or leave id out of dataset.source.columns"
        )
    return Problems(kept, rows=len(table.rows), where=table.where, note=table.note)


def _to_problem(
    row: Mapping[str, Any], columns: Mapping[str, str], answer_of: Callable[[str], str], name: str
) -> Problem:
    texts = {field: as_text(row[column]) for field, column in columns.items() if field != "answers_alt"}
    texts["answer"] = answer_of(texts.get("answer", "")).strip()
    texts["id"] = texts.get("id") or name
    others = _texts(row[columns["answers_alt"]]) if "answers_alt" in columns else []
    fresh = dict.fromkeys(text.strip() for text in others)
    return Problem(**texts, answers_alt=tuple(text for text in fresh if text not in ("", texts["answer"])))


def _is_usable(problem: Problem, has_answer: bool) -> bool:
    try:
        "".join((problem.id, problem.problem, *problem.golds, problem.demonstration)).encode()
    except UnicodeEncodeError:  # no tokenizer takes half of a surrogate pair
        return False
    return bool(normalise(problem.problem) and (problem.answer or not has_answer))  # $$ asks nothing


def as_text(value: object) -> str:
    """Returns a cell as text: of several the texts, with commas; of a number its digits; true and false as
    JSON writes them; empty without one.

    Raises:
        ConfigError: it holds a mapping, bytes, or lists in a list.
    """
    if isinstance(value, list) and not any(isinstance(item, list | tuple) for item in value):
        return ", ".join(_texts(value))
    if isinstance(value, float | Decimal):
        number = Decimal(str(value))
        whole = number.is_finite() and number.adjusted() < 40 and number == number.to_integral_value()
        # 27.0 is what a column of numbers makes of 27 where a row has none.
        return str(int(number)) if whole else str(value) if number.is_finite() else ""
    if isinstance(value, list | tuple | dict | bytes):
        wanted = "expected text, a number or a list of them; change dataset.source.columns"
        raise ConfigError(f"got a cell with {str(value)[:60]}, {wanted}")
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _texts(value: object) -> list[str]:
    """Returns the texts of a cell that may hold several."""
    return [as_text(item) for item in value] if isinstance(value, list) else [as_text(value)]
