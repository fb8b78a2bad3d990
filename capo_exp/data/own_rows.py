"""A user's own questions: a file of any common kind, or a dataset on the hub, with whatever columns it has.

What has no split to evaluate on is divided: a share of its distinct questions is held out, which the seed
chooses whatever their order, and rows that ask the same stay together.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Annotated

from capo_exp.config.errors import ConfigError, error, suggest
from capo_exp.config.ranges import AT_LEAST_0, INNER_SHARE, one_of
from capo_exp.data.contamination import normalise
from capo_exp.data.files import read_splits
from capo_exp.data.math_problems import ANSWER_FORMATS, OWN_COLUMNS, OWN_EXTRA_COLUMNS, to_problems
from capo_exp.data.rows import Problems, Table, read_hub

Columns = Mapping[str, str | None]
"""Field of Problem -> column; null = there is none."""
KINDS = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    list: "a list",
    dict: "a mapping",
}


def from_file(
    split: str,
    *,
    path: str | None,
    columns: Columns,
    answer_format: Annotated[str, one_of(*ANSWER_FORMATS)],
    eval_fraction: Annotated[float, INNER_SHARE],
    seed: Annotated[int, AT_LEAST_0],
    eval_path: str | None,
) -> Problems:
    """Returns the problems of one split of a file, or of a folder of `save_to_disk`.

    Args:
        split: train or test, or a name that the folder has for it.
        path: the file or folder.
        columns: where the fields of a problem stand; `problem` always, without `answer` a reward has none.
        answer_format: how the answer column holds the answer: plain, last_boxed or after_hashes.
        eval_fraction: share of the distinct questions to evaluate on, where there is one split.
        seed: chooses them.
        eval_path: a file of its own to evaluate on; null = a share of `path`.

    Raises:
        ConfigError: no such file, nothing readable, a column is missing or of several kinds, too few rows.
    """
    key, place = "dataset.path", path
    if split != "train" and eval_path is not None:
        key, place = "dataset.source.eval_path", eval_path
    if place is None:
        raise error(key, None, "your file, as in dataset.path=questions.jsonl")
    tables = read_splits(place, key)
    rows = tables.get(split, next(iter(tables.values())) if len(tables) == 1 else None)
    if rows is None:
        named = f"{place} has the splits {', '.join(tables)}, expected one of them"
        raise ConfigError(f"got split {split}, {named}; change dataset.train_split or dataset.eval_split")
    found = _to_problems(Table(rows, place), columns, answer_format)
    whole = eval_path is not None or (split in tables and len(tables) > 1)
    return found if whole else divide(found, split, eval_fraction, seed)


def from_hub(
    split: str,
    *,
    path: str | None,
    hub_id: str | None,
    hub_config: str | None,
    hub_revision: str | None,
    columns: Columns,
    answer_format: Annotated[str, one_of(*ANSWER_FORMATS)],
    eval_fraction: Annotated[float | None, INNER_SHARE],
    seed: Annotated[int, AT_LEAST_0],
) -> Problems:
    """Returns the problems of one split of a dataset on the hub, or of a part of its train split.

    Args:
        split: the hub's name of it.
        path: null.
        hub_id: org/name.
        hub_config: the hub's name for a part of the dataset; null if it has none.
        hub_revision: a commit; null = the newest.
        columns: as in from_file, and so the next.
        answer_format: how the answer column holds the answer.
        eval_fraction: share of the train split's questions to evaluate on; null = the hub has a split for it.
        seed: chooses them.

    Raises:
        ConfigError: as from_file; no hub_id, or the hub cannot be reached or has no such split.
    """
    if path is not None:
        raise error("dataset.path", path, "null with dataset=hub; dataset=file reads a file")
    if hub_id is None:
        raise error(
            "dataset.source.hub_id", None, "a dataset on the hub, as in dataset.source.hub_id=org/name"
        )
    expected = (
        "expected a hub id and a split of it: change dataset.source.hub_id, hub_config or eval_fraction, "
        "dataset.train_split or eval_split"
    )
    asked = split if eval_fraction is None else "train"
    table = read_hub(hub_id, config=hub_config, split=asked, revision=hub_revision, expected=expected)
    found = _to_problems(table, columns, answer_format)
    return found if eval_fraction is None else divide(found, split, eval_fraction, seed)


def divide(found: Problems, split: str, eval_fraction: float, seed: int) -> Problems:
    """Returns the problems of `train`, or the others: at least one question each, none in both.

    Raises:
        ConfigError: there are fewer than two different questions, or the split has another name.
    """
    if split not in ("train", "test"):
        raise ConfigError(
            f"got split {split} of {found.where}, one split that is divided; expected train or test as "
            "dataset.train_split and dataset.eval_split"
        )
    questions = {problem.id: normalise(problem.problem) for problem in found}
    drawn = sorted(set(questions.values()), key=lambda asked: _digest(f"{seed}\0{asked}"))
    count = max(1, round(eval_fraction * len(drawn)))
    if len(drawn) <= count:
        raise ConfigError(
            f"got {len(drawn)} different questions in {found.where}, too few to hold out {count}; expected "
            "more rows, a smaller dataset.source.eval_fraction, or dataset.source.eval_path"
        )
    held_out = set(drawn[:count])
    part = [problem for problem in found if (questions[problem.id] in held_out) != (split == "train")]
    unusable = found.rows - len(found) if split == "train" else 0
    return Problems(part, rows=len(part) + unusable, where=found.where, note=found.note)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _to_problems(table: Table, columns: Columns, answer_format: str) -> Problems:
    used = {field: column for field, column in columns.items() if column is not None}
    if "problem" not in used or not set(used) <= {*OWN_COLUMNS, *OWN_EXTRA_COLUMNS}:
        wanted = f"problem and any of answer, {', '.join(OWN_EXTRA_COLUMNS)}"
        raise error("dataset.source.columns", ", ".join(used), wanted)
    for field, column in used.items() if table.rows else ():
        if column not in table.columns:
            key = f"dataset.source.columns.{field}={column}"
            raise ConfigError(f"{key}: no column of {table.where}; {suggest(column, sorted(table.columns))}")
        if field != "answers_alt":
            _check_kinds(table, field, column)
    rows = [{column: row[column] for column in used.values()} for row in table.rows]  # `broken` means nothing
    prefix = table.where.rpartition("/")[2]
    return to_problems(replace(table, rows=rows), used, ANSWER_FORMATS[answer_format], prefix)


def _check_kinds(table: Table, field: str, column: str) -> None:
    """Refuses a column of texts and numbers side by side, and mappings and others where text is due."""
    first: dict[str, int] = {}
    for number, row in enumerate(table.rows, 1):
        if (cell := row[column]) is not None:
            first.setdefault(KINDS.get(type(cell), type(cell).__name__), number)
    key = f"dataset.source.columns.{field}={column}"
    if len(first) > 1:
        (one, row), (other, further) = sorted(first.items(), key=lambda pair: pair[1])[:2]
        raise ConfigError(
            f"{key}: {one} in row {row} and {other} in row {further}; expected one kind in a column"
        )
    if "a mapping" in first or (field == "problem" and first and "text" not in first):
        raise ConfigError(f"{key}: {next(iter(first))} in row {next(iter(first.values()))}; expected text")
