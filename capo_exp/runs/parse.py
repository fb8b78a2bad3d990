"""What can be read of a run's files, and what is wrong with the rest. Imports no torch."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from capo_exp.config.errors import ConfigError
from capo_exp.config.record import read_values
from capo_exp.runs.files import open_regular

LoggedRow = Mapping[str, Any]


def scan_jsonl(path: Path) -> tuple[list[LoggedRow], list[str]]:
    """Returns the rows of a .jsonl file, and what is wrong with each other line."""
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path}: {error.strerror}"]
    rows: list[LoggedRow] = []
    damaged: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(_row(line))
        except (ValueError, RecursionError) as error:
            damaged.append(f"{path}, line {number}: {error}")
    return rows, damaged


def _row(line: bytes) -> LoggedRow:
    """Reads a JSON object whose values are as check_row wants them."""
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"got {str(row)[:40]}, expected a JSON object")
    check_row(row)
    return row


def check_row(row: LoggedRow) -> None:
    """Raises ValueError for a value that is neither number nor null, cards that are no texts, or a counter
    that is not finite."""
    for key, value in row.items():
        fits, expected = value is None or _is_number(value), "a number"
        if key == "cards":
            fits = isinstance(value, list) and all(isinstance(card, str) for card in value)
            expected = "a list of texts"
        if key.startswith("counter/"):
            fits = _is_number(value) and math.isfinite(value)
        if not fits:
            raise ValueError(f"{key} is {json.dumps(value, default=str)[:40]}, expected {expected}")


def _is_number(value: object) -> TypeGuard[float]:
    """Returns whether a value can be computed with; an integer of any length, which JSON may hold, cannot."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a recorded config; empty if there is none.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        with open_regular(path) as file:
            return read_values(file.read().decode(), str(path))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore or remove it") from None


def read_rows(path: Path, kinds: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns all rows of a parquet file.

    Args:
        path: of the file.
        kinds: what columns have to hold where they are there: number, text, or list of one of these.

    Raises:
        ConfigError: It cannot be read, or a column holds something else.
    """
    import pyarrow.parquet as pq  # here, so that whoever reads no completions does not wait for it

    try:
        with open_regular(path) as file:
            table = pq.ParquetFile(file).read()  # read_table would import pandas
        for column in table.schema:
            wanted = (kinds or {}).get(column.name)
            if wanted and not _holds(column.type, wanted):
                raise ValueError(f"{column.name} is {column.type}, expected a {wanted}")
        return table.to_pylist()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read as parquet ({reason}); restore or remove it") from None


def _holds(kind: Any, wanted: str) -> bool:
    """Returns whether a type of pyarrow is what `kinds` of read_rows says; that of nulls alone is."""
    from pyarrow import types

    if types.is_null(kind):
        return True
    if wanted.startswith("list of "):
        return types.is_list(kind) and _holds(kind.value_type, wanted.removeprefix("list of "))
    if wanted == "text":
        return types.is_string(kind) or types.is_large_string(kind)
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def is_parquet(path: Path) -> bool:
    """Returns whether a file begins and ends as parquet; reads no more of it."""
    with suppress(OSError), open_regular(path) as file:
        start = file.read(4)
        file.seek(-4, os.SEEK_END)
        return start == file.read(4) == b"PAR1"
    return False
