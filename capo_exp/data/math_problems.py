"""Problem sets with a known answer (MATH, GSM8K, ...): parquet files, or the Hugging Face hub."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capo_exp.config import ConfigError
from capo_exp.grading import last_boxed
from capo_exp.types import Problem

DATA_DIR_VARIABLE = "CAPO_DATA_DIR"
OWN_COLUMNS = {"problem": "problem", "answer": "answer"}
"""Field of Problem -> column of this project's own parquet files."""
OWN_EXTRA_COLUMNS = {"id": "id", "demonstration": "solution", "level": "level", "family": "type"}
FIELDS = (*OWN_COLUMNS, *OWN_EXTRA_COLUMNS)

Rows = list[dict[str, Any]]

ANSWER_FORMATS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "last_boxed": lambda text: last_boxed(text) or "",
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
) -> list[Problem]:
    """One split in the order of its source, without rows flagged `broken` or lacking question or answer.

    Args:
        split: name of the split, which is also the name of its file.
        path: a directory with <name>/<split>.parquet or <split>.parquet, or one parquet file, which then
            serves every split; null = the directory that CAPO_DATA_DIR names, and if that is unset the hub.
        name: name of the set; its folder, and the prefix of ids where the source has none.
        hub_id: dataset on the hub; null if it is not there.
        hub_config: the hub's name for a part of the dataset; null if it has none.
        hub_revision: commit on the hub; null = the newest.
        columns: field of Problem -> column on the hub. A file may have these columns too, or this project's
            own: problem, answer, and if wanted id, solution, level, type, broken.
        answer_format: how the hub's answer column holds the answer, one of ANSWER_FORMATS.

    Raises:
        ConfigError: nothing found, nothing readable, a column is missing, or no row is left.
    """
    _check_columns(columns, answer_format)
    file = _find_file(split, path, name)
    if file is not None:
        where, rows = str(file), _read_parquet(file)
    elif hub_id is not None:
        where, rows = f"hub dataset {hub_id}", _read_hub(split, name, hub_id, hub_config, hub_revision)
    else:
        raise ConfigError(f"got dataset.path=null and no {DATA_DIR_VARIABLE}, {_expected(name, split)}")
    found = set(rows[0]) if rows else set(columns.values())
    if file is not None and set(OWN_COLUMNS.values()) <= found:
        columns = OWN_COLUMNS | {field: c for field, c in OWN_EXTRA_COLUMNS.items() if c in found}
        answer_format = "plain"
    missing = sorted(set(columns.values()) - found)
    if missing:
        raise ConfigError(
            f"got {where} with columns {', '.join(sorted(found))}, expected also {', '.join(missing)} "
            "(or problem and answer in a file); change dataset.path or dataset.source.columns"
        )
    kept = _to_problems(rows, columns, ANSWER_FORMATS[answer_format], f"{name}/{split}")
    if not kept:
        raise ConfigError(
            f"got no usable row of {len(rows)} in {where}, expected questions with answers; "
            "change dataset.path or dataset.source.answer_format"
        )
    logging.getLogger(__name__).info(
        "%s: %d problems, %d unusable rows", where, len(kept), len(rows) - len(kept)
    )
    return kept


def _check_columns(columns: Mapping[str, str], answer_format: str) -> None:
    if answer_format not in ANSWER_FORMATS:
        known = ", ".join(ANSWER_FORMATS)
        raise ConfigError(f"got dataset.source.answer_format={answer_format}, expected one of {known}")
    if not set(OWN_COLUMNS) <= set(columns) <= set(FIELDS):
        raise ConfigError(
            f"got dataset.source.columns for {', '.join(columns)}, expected problem, answer and any of "
            f"{', '.join(OWN_EXTRA_COLUMNS)}"
        )


def _find_file(split: str, path: str | None, name: str) -> Path | None:
    """The parquet file to read; None = ask the hub."""
    key, value = "dataset.path", path
    if value is None:
        key, value = DATA_DIR_VARIABLE, os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return None
    root = Path(value).expanduser()
    if root.is_file():
        return root
    for file in (root / name / f"{split}.parquet", root / f"{split}.parquet"):
        if file.is_file():
            return file
    state = "without such a file" if root.is_dir() else "which does not exist"
    raise ConfigError(f"got {key}={value} {state}, {_expected(name, split)}")


def _expected(name: str, split: str) -> str:
    return (
        f"expected a directory with {name}/{split}.parquet or {split}.parquet, or a parquet file; "
        f"set dataset.path or {DATA_DIR_VARIABLE}"
    )


def _read_parquet(file: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file).read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = _one_line(error)
        raise ConfigError(f"got {file} ({reason}), expected a parquet file; change dataset.path") from error


def _read_hub(split: str, name: str, hub_id: str, config: str | None, revision: str | None) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"got no {split} split of {hub_id} from the hub ({_one_line(error)}), {_expected(name, split)}"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."


def _to_problems(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    answer_of: Callable[[str], str],
    prefix: str,
) -> list[Problem]:
    kept = []
    for index, row in enumerate(rows):
        fields = {field: _text(row[column]) for field, column in columns.items()}
        fields["answer"] = answer_of(fields["answer"]).strip()
        fields["id"] = fields.get("id") or f"{prefix}/{index}"
        if fields["problem"] and fields["answer"] and not row.get("broken"):
            kept.append(Problem(**fields))
    return kept


def _text(value: object) -> str:
    return "" if value is None else str(value)
