"""What can be read of a run's files, and what is wrong with the rest. Imports no torch."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.config.record import read_values

LoggedRow = Mapping[str, Any]


def scan_jsonl(path: Path) -> tuple[list[LoggedRow], list[str]]:
    """Returns the rows of a .jsonl file, and what is wrong with each other line."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
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
    """Reads a JSON object whose values are numbers or null, and whose counters are numbers."""
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"got {str(row)[:40]}, expected a JSON object")
    for key, value in row.items():
        fits = value is None or _is_number(value) or (key == "cards" and isinstance(value, list))
        if key.startswith("counter/"):
            fits = _is_number(value) and math.isfinite(value)
        if not fits:
            raise ValueError(f"{key} is {json.dumps(value)[:40]}, expected a number")
    return row


def _is_number(value: object) -> bool:
    """Returns whether a value can be computed with; an integer of any length, which JSON may hold, cannot."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a recorded config; empty if there is none.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        return read_values(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore or remove it") from None


def read_parquet(path: Path) -> list[LoggedRow]:
    """Returns all rows of a parquet file.

    Raises:
        ConfigError: It cannot be read.
    """
    import pyarrow.parquet as pq  # here, so that whoever reads no completions does not wait for it

    try:
        return pq.ParquetFile(path).read().to_pylist()  # read_table would import pandas
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read as parquet ({reason}); remove the file") from None


def is_parquet(path: Path) -> bool:
    """Returns whether a file begins and ends as parquet; reads no more of it."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(4)
        file.seek(-4, os.SEEK_END)
        return start == file.read(4) == b"PAR1"
    return False
