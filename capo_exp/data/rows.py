"""The rows of one split as their source has them: a parquet file, or the Hugging Face hub."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capo_exp.config.errors import ConfigError, brief, error
from capo_exp.core.types import Problem

if TYPE_CHECKING:
    import pyarrow as pa

DATA_DIR_VARIABLE = "CAPO_DATA_DIR"
TEST_SHARE = 1 / 8
"""Of all problems that can be made here; held out from train and from the warm start."""

Rows = list[dict[str, Any]]
NARROW = {"float": np.float32, "halffloat": np.float16}
"""Arrow's name of a float that Python would widen -> its type."""


@dataclass(frozen=True)
class Table:
    """Rows, and where they came from."""

    rows: Rows
    where: str
    """For messages: the file, or the dataset on the hub."""
    note: str = ""
    """What a person should know of this source; empty if nothing."""

    @property
    def columns(self) -> set[str]:
        """Returns those of the first row; without rows there are none."""
        return set(self.rows[0]) if self.rows else set()


class Problems(list[Problem]):
    """The usable problems of a split, in order, with what else its source says."""

    def __init__(self, found: list[Problem], *, rows: int, where: str, note: str = "") -> None:
        super().__init__(found)
        self.rows = rows
        """Rows of the source, unusable ones too."""
        self.where = where
        self.note = note


def check_made(split: str, path: str | None) -> None:
    """Refuses a path, and a split, that problems made here do not have."""
    if path is not None:
        raise error("dataset.path", path, "null: these problems are made, not read")
    if split not in ("train", "test"):
        raise ConfigError(
            f"got split {split!r}, expected train or test; change dataset.train_split or dataset.eval_split"
        )


def is_held_out(text: str) -> bool:
    """Returns whether what a text stands for belongs to the test split of problems made here."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def find_file(split: str, path: str | None, name: str) -> Path | None:
    """Returns the parquet file to read; None = ask the hub.

    Raises:
        ConfigError: a path or CAPO_DATA_DIR is given, and the file is not there.
    """
    key, value = "dataset.path", path
    if value is None:
        key, value = DATA_DIR_VARIABLE, os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return None
    root = Path(os.path.expanduser(value))
    if os.path.isfile(root):
        return root
    for file in (root / name / f"{split}.parquet", root / f"{split}.parquet"):
        if os.path.isfile(file):
            return file
    state = "without such a file" if os.path.isdir(root) else "which does not exist"
    raise ConfigError(f"got {key}={value} {state}, {expect_file(name, split)}")


def expect_file(name: str, split: str) -> str:
    """Returns the end of a message about a file that is not there."""
    return (
        f"expected a directory with {name}/{split}.parquet or {split}.parquet, or a parquet file; "
        f"set dataset.path or {DATA_DIR_VARIABLE}"
    )


def read_table(table: "pa.Table", where: object) -> Rows:
    """Returns the rows of a table. A float of 16 or 32 bits is the number of fewest digits that it stands
    for, 3.1 and not 3.0999999.

    Raises:
        ConfigError: two columns have one name.
    """
    check_columns(table.column_names, f"{where}: ")
    rows = table.to_pylist()
    kinds = {field.name: _find_kind(field.type) for field in table.schema}
    narrow = {name: NARROW[kind] for name, kind in kinds.items() if kind in NARROW}
    for row in rows if narrow else ():
        row |= {name: _shortest(row[name], kind) for name, kind in narrow.items()}
    return rows


def check_columns(names: Sequence[str], where: str = "") -> None:
    """Raises ConfigError where a column is there twice: nothing says which of them is meant."""
    if twice := [name for place, name in enumerate(names) if name and name in names[:place]]:
        raise ConfigError(f"{where}the column {twice[0]} stands there twice; expected one of each name")


def _find_kind(kind: Any) -> str:
    """Returns the name of an Arrow type, of lists and dictionaries that of what is in them."""
    inner = getattr(kind, "value_type", None)
    return str(kind) if inner is None else _find_kind(inner)


def _shortest(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return [_shortest(each, kind) for each in value]
    return value if value is None else float(str(kind(value)))


def read_parquet(file: Path) -> Rows:
    """Reads a file.

    Raises:
        ConfigError: it is no parquet file, or two columns have one name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return read_table(pq.ParquetFile(file).read(), file)
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as failure:
        reason = brief(failure)
        raise ConfigError(f"got {file} ({reason}), expected a parquet file; change dataset.path") from failure


def read_hub(hub_id: str, *, config: str | None, split: str, revision: str | None, expected: str) -> Table:
    """Reads a split of a dataset on the hub; `expected` ends the message where that fails.

    Raises:
        ConfigError: the hub cannot be reached, or has no such split.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found: Any = datasets.load_dataset(hub_id, config, split=split, revision=revision)
        rows = read_table(found.with_format("arrow")[:], hub_id)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as failure:  # RuntimeError: it is a script
        reason = brief(failure)
        raise ConfigError(
            f"got no {split} split of {hub_id} from the hub ({reason}), {expected}"
        ) from failure
    newest = f"{hub_id}: no commit is pinned (dataset.source.hub_revision=null), these are today's data"
    return Table(rows, f"hub dataset {hub_id}", "" if revision else newest)
