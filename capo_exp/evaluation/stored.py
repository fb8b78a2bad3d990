"""Completions that are on disk, of whatever model: graded and scored without one. Imports no torch."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.evaluation.card import describe_grader
from capo_exp.evaluation.scores import Row, score_rows
from capo_exp.grading.verifier import Verifier
from capo_exp.runs.files import replace_file, write_json
from capo_exp.runs.parse import read_rows

COLUMNS = {"completion": ("completion",), "gold": ("gold", "answer"), "problem": ("index", "problem", "id")}
"""What a file must have -> names of the column, the first that is there."""
GROUPS = ("model", "task", "benchmark")
"""Columns that split a file into sets with a score each, where they differ."""
ALL = "all"


@dataclass(frozen=True)
class StoredScores:
    """The score of one set of completions in a file."""

    group: dict[str, str]  # What sets it apart: column -> value
    scores: dict[str, Any]  # As of a benchmark, and what the file's own labels say, None without: `_scored`
    problems: list[Row]  # One row a problem


@dataclass(frozen=True)
class Stored:
    """A file of completions, graded."""

    completions: list[Row]  # The file's rows with extracted, correct and reason
    groups: list[StoredScores]


def score_stored(path: Path, verifier: Verifier) -> Stored:
    """Grades each row of a parquet file and scores each of its groups.

    Its columns are completion, gold (or answer; text or a list of accepted ones), problem (or index, id;
    those with equal golds are samples of one problem), and if wanted model, task, label, tokens, truncated.

    Raises:
        ConfigError: no such file, no parquet, a column is missing, no row.
    """
    table = _read(path)
    graded = _grade(table, verifier)
    split = [name for name in GROUPS if len({row.get(name) for row in table}) > 1]
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in graded:
        values = [str(row.get(name)) for name in split]
        groups[tuple(values)].append(row)
        if len(values) > 1:  # also what the first column says alone
            groups[values[0], *[ALL] * (len(values) - 1)].append(row)
    named = {values: dict(zip(split, values, strict=True)) for values in sorted(groups)}
    return Stored(graded, [_scored(group, groups[values], verifier) for values, group in named.items()])


def write_stored(folder: Path, source: Path, stored: Stored, verifier: Mapping[str, Any]) -> None:
    """Writes card.json, completions.parquet, problems.parquet and scores.json of a graded file."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    card = {"completions": source.name, "sha256": digest, "grader": describe_grader(verifier)}
    write_json(folder / "card.json", card)
    write_rows(folder / "completions.parquet", stored.completions)
    problems = [{**group.group, **problem} for group in stored.groups for problem in group.problems]
    write_rows(folder / "problems.parquet", problems)
    write_json(folder / "scores.json", [{**each.group, **each.scores} for each in stored.groups])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes one parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replace_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(rows)), partial, compression="zstd")


def _read(path: Path) -> list[Row]:
    if not path.exists():
        raise ConfigError(f"completions={path}: no such file; expected a parquet file")
    try:
        rows = read_rows(path, {"tokens": "number"})
    except ConfigError as error:
        raise ConfigError(f"completions={path}: expected a parquet file ({error})") from error
    if not rows:
        raise ConfigError(f"completions={path}: no row; expected completions")
    for names in COLUMNS.values():
        if not set(names) & set(rows[0]):
            wanted, found = " or ".join(names), ", ".join(rows[0])
            raise ConfigError(f"completions={path}: columns {found}; expected also {wanted}")
    return rows


def _grade(table: Sequence[Row], verifier: Verifier) -> list[Row]:
    completion, gold, key = (next(name for name in names if name in table[0]) for names in COLUMNS.values())
    texts = ["" if row[completion] is None else str(row[completion]) for row in table]
    golds = [_golds(row[gold]) for row in table]
    problems = [str(row.get("problem", "")) for row in table]
    verdicts = verifier.score([[text] for text in texts], golds, problems).grades
    pairs = zip(table, golds, strict=True)
    keys = [(*(row.get(name) for name in GROUPS), str(row[key]), accepted) for row, accepted in pairs]
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(keys))}
    return [
        {**row, "index": numbers[identity], "id": str(row.get("id", row[key])), "gold": list(accepted)}
        | asdict(grade)
        for row, accepted, identity, (grade,) in zip(table, golds, keys, verdicts, strict=True)
    ]


def _golds(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ("" if value is None else str(value),)


def _scored(group: dict[str, str], rows: list[Row], verifier: Verifier) -> StoredScores:
    """Adds the share of samples that are right by `label`, a mean over problems, and how many of those are
    wrong by us, and the other way round."""
    scores, problems = score_rows(rows, verifier)
    scores |= dict.fromkeys(("by_label", "false_negatives", "false_positives"))
    if all(row.get("label") in (True, False) for row in rows):
        against = Counter((bool(row["label"]), row["correct"]) for row in rows)
        labels: dict[Any, list[bool]] = defaultdict(list)
        for row in rows:
            labels[row["index"]].append(row["label"])
        scores["by_label"] = fmean(map(fmean, labels.values()))
        scores["false_negatives"], scores["false_positives"] = against[True, False], against[False, True]
    return StoredScores(group, scores, problems)
