"""Problem sets with a known answer (MATH, GSM8K, ...): parquet files, or the Hugging Face hub."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Problem
from capo_exp.data.rows import Problems, Table, read_table, require
from capo_exp.grading.compare import last_boxed

OWN_COLUMNS = {"problem": "problem", "answer": "answer"}
"""Field of Problem -> column of this project's own parquet files."""
OWN_EXTRA_COLUMNS = {
    "id": "id",
    "demonstration": "solution",
    "level": "level",
    "family": "type",
    "answers_alt": "answers_alt",
}
FIELDS = (*OWN_COLUMNS, *OWN_EXTRA_COLUMNS)


def last_box(solution: str) -> str:
    r"""Content of the last \boxed{...}; where there is none, the one character that \boxed 2 boxes."""
    bare = re.findall(r"\\boxed\s+(\w)", solution)
    return last_boxed(solution) or (bare[-1] if bare else "")


ANSWER_FORMATS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "last_boxed": last_box,
    "after_hashes": lambda text: text.rpartition("####")[2].replace(",", "") if "####" in text else "",
}
"""How the answer stands in its column: alone, in the last box of a solution, or after #### as in 1,200."""


def problems(
    split: str,
    *,
    path: str | None,
    name: str,
    hub_id: str | None,
    hub_config: str | None,
    hub_revision: str | None,
    columns: Mapping[str, str],
    answer_format: str,
    hub_split: str | None = None,
) -> Problems:
    """One split in the order of its source, without the rows that are flagged `broken`, lack question or
    answer, or hold text that cannot be written as UTF-8 (half of a surrogate pair).

    Args:
        split: name of the split, which is also the name of its file.
        path: a directory with <name>/<split>.parquet or <split>.parquet, or one parquet file, which then
            serves every split; null = the directory that CAPO_DATA_DIR names, and if that is unset the hub.
        name: name of the set; its folder, and the prefix of ids where the source has none.
        hub_id: dataset on the hub; null if it is not there.
        hub_config: the hub's name for a part of the dataset; null if it has none.
        hub_revision: commit on the hub; null = the newest.
        columns: field of Problem -> column on the hub. A file may have these columns too, or this project's
            own: problem, answer, and if wanted id, solution, level, type, answers_alt, broken.
        answer_format: how the hub's answer column holds the answer, one of ANSWER_FORMATS.
        hub_split: the hub's name of the split; null = the same.

    Raises:
        ConfigError: nothing found, nothing readable, a column is missing, two rows have one id, or no row is
            left.
    """
    if answer_format not in ANSWER_FORMATS:
        known = ", ".join(ANSWER_FORMATS)
        raise ConfigError(f"got dataset.source.answer_format={answer_format}, expected one of {known}")
    check_columns(columns)
    table = read_table(
        split,
        path=path,
        name=name,
        hub_id=hub_id,
        hub_config=hub_config,
        hub_revision=hub_revision,
        hub_split=hub_split,
    )
    if is_own(table):
        return own_problems(table, f"{name}/{split}")
    require(
        table,
        set(columns.values()),
        " (or problem and answer in a file); change dataset.path or dataset.source.columns",
    )
    return to_problems(table, columns, ANSWER_FORMATS[answer_format], f"{name}/{split}")


def check_columns(columns: Mapping[str, str]) -> None:
    """Checks that the fields are those of a Problem, and question and answer are among them.

    Raises:
        ConfigError: they are not.
    """
    if not set(OWN_COLUMNS) <= set(columns) <= set(FIELDS):
        raise ConfigError(
            f"got dataset.source.columns for {', '.join(columns)}, expected problem, answer and any of "
            f"{', '.join(OWN_EXTRA_COLUMNS)}"
        )


def is_own(table: Table) -> bool:
    """Whether a file has this project's own columns."""
    return table.is_file and set(OWN_COLUMNS.values()) <= table.columns


def own_problems(table: Table, prefix: str) -> Problems:
    """Problems of a file with this project's own columns; raises as `problems`."""
    extra = {field: c for field, c in OWN_EXTRA_COLUMNS.items() if c in table.columns}
    return to_problems(table, OWN_COLUMNS | extra, ANSWER_FORMATS["plain"], prefix)


def to_problems(
    table: Table, columns: Mapping[str, str], answer_of: Callable[[str], str], prefix: str
) -> Problems:
    """The usable rows as problems; raises as `problems`."""
    found = [
        _to_problem(row, columns, answer_of, f"{prefix}/{index}")
        for index, row in enumerate(table.rows)
        if not row.get("broken")
    ]
    kept = [problem for problem in found if _is_usable(problem)]
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
    unusable = len(table.rows) - len(kept)
    logging.getLogger(__name__).info("%s: %d problems, %d unusable rows", table.where, len(kept), unusable)
    return Problems(kept, table)


def _to_problem(
    row: Mapping[str, Any], columns: Mapping[str, str], answer_of: Callable[[str], str], name: str
) -> Problem:
    texts = {field: as_text(row[column]) for field, column in columns.items() if field != "answers_alt"}
    texts["answer"] = answer_of(texts["answer"]).strip()
    texts["id"] = texts.get("id") or name
    others = _texts(row[columns["answers_alt"]]) if "answers_alt" in columns else []
    fresh = dict.fromkeys(text.strip() for text in others)
    return Problem(**texts, answers_alt=tuple(text for text in fresh if text not in ("", texts["answer"])))


def _is_usable(problem: Problem) -> bool:
    try:
        "".join((problem.id, problem.problem, *problem.golds, problem.demonstration)).encode()
    except UnicodeEncodeError:  # no tokenizer takes half of a surrogate pair
        return False
    return bool(problem.problem.strip() and problem.answer)


def as_text(value: object) -> str:
    """A cell as text; several as one, with commas; empty if it is missing or holds no text or number."""
    if isinstance(value, list):
        return ", ".join(_texts(value))
    if isinstance(value, float):  # 27.0 is what a column of numbers makes of 27 where a row has none
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return "" if value is None or isinstance(value, dict | bytes) else str(value)


def _texts(value: object) -> list[str]:
    """A cell that may hold several texts."""
    return [as_text(item) for item in value] if isinstance(value, list) else [as_text(value)]
