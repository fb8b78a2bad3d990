"""The rows of one split as their source has them: a parquet file, or the Hugging Face hub."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Problem

DATA_DIR_VARIABLE = "CAPO_DATA_DIR"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows, and where they came from."""

    rows: Rows
    where: str
    """For messages: the file, or the dataset on the hub."""
    is_file: bool
    note: str = ""
    """What a person should know of this source; empty if nothing."""

    @property
    def columns(self) -> set[str]:
        """Of the first row; empty without rows."""
        return set(self.rows[0]) if self.rows else set()


class Problems(list[Problem]):
    """The usable problems of a split, in order, with what else its source says."""

    def __init__(self, found: list[Problem], table: Table) -> None:
        super().__init__(found)
        self.rows = len(table.rows)
        """Of the source, unusable ones too."""
        self.note = table.note
        self.where = table.where


def read_table(
    split: str,
    *,
    path: str | None,
    name: str,
    hub_id: str | None,
    hub_config: str | None,
    hub_revision: str | None,
    hub_split: str | None,
) -> Table:
    """Reads a split; see math_problems.problems for the arguments.

    Raises:
        ConfigError: nothing found, or nothing readable.
    """
    file = _find_file(split, path, name)
    if file is not None:
        return Table(_read_parquet(file), str(file), True)
    if hub_id is None:
        raise ConfigError(f"got dataset.path=null and no {DATA_DIR_VARIABLE}, {_expected(name, split)}")
    rows = _read_hub(hub_split or split, hub_id, hub_config, hub_revision, _expected(name, split))
    newest = f"{hub_id}: no commit is pinned (dataset.source.hub_revision=null), these are today's data"
    return Table(rows, f"hub dataset {hub_id}", False, "" if hub_revision else newest)


def require(table: Table, columns: set[str], advice: str) -> None:
    """Checks that the rows have the columns; a table without rows has any.

    Raises:
        ConfigError: some are missing.
    """
    missing = sorted(columns - table.columns)
    if table.rows and missing:
        raise ConfigError(
            f"got {table.where} with columns {', '.join(sorted(table.columns))}, expected also "
            f"{', '.join(missing)}{advice}"
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise ConfigError(f"got {file} ({reason}), expected a parquet file; change dataset.path") from error


def _read_hub(split: str, hub_id: str, config: str | None, revision: str | None, expected: str) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"got no {split} split of {hub_id} from the hub ({one_line(error)}), {expected}"
        ) from error


def one_line(error: Exception) -> str:
    """An error's message, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
