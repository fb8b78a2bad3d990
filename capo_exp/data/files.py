"""The rows of a user's own file: JSON lines, JSON, CSV, TSV, parquet, Arrow, or a folder of save_to_disk."""

import csv
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from capo_exp.config.errors import ConfigError, brief, error
from capo_exp.data.rows import Rows, check_columns, read_parquet, read_table


def read_splits(path: str, key: str) -> dict[str, Rows]:
    """Reads a file, whose one split has no name, or the splits of a folder. Every row has every column.

    Args:
        path: of the file or folder.
        key: that names it, for messages.

    Raises:
        ConfigError: it is not there, of another kind, or cannot be read.
    """
    place = Path(os.path.expanduser(path))
    if not os.path.exists(place):
        raise error(key, path, f"a file or folder that exists ({place.absolute()} does not)")
    read = _read_folder if place.is_dir() else READERS.get(place.suffix.lower())
    if read is None:
        raise error(key, path, f"a file that ends in {', '.join(READERS)}, or a folder of save_to_disk")
    try:
        found = read(place)
    except ConfigError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError, LookupError, TypeError) as failure:
        raise ConfigError(f"{key}={path}: it cannot be read ({brief(failure)})") from failure
    return {name: _fill(rows) for name, rows in (found if isinstance(found, dict) else {"": found}).items()}


def _fill(rows: Rows) -> Rows:
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


def _read_json_lines(file: Path) -> Rows:
    with file.open("rb") as lines:
        return [_parse(line, f"{file} line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _read_json(file: Path) -> Rows:
    """Reads a list of objects; files with an object a line have this ending, too."""
    text = file.read_bytes()
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _read_json_lines(file)
    try:
        rows = _parse_json(text)
    except ConfigError as failure:
        raise ConfigError(f"{file}: {failure}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{file} item {number}: {str(row)[:80]}; expected an object")
    return rows


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = _parse_json(line)
    except (ValueError, RecursionError) as failure:
        at = f"{failure.msg} at column {failure.colno}" if isinstance(failure, json.JSONDecodeError) else ""
        raise ConfigError(f"{where}: {at or brief(failure)}; expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: {str(row)[:80]}; expected one JSON object a line")
    return row


def _parse_json(text: bytes) -> Any:
    """Reads JSON; a number with a point or an exponent keeps its digits, and no name stands twice."""
    return json.loads(text, parse_float=_parse_number, object_pairs_hook=_to_row)


def _parse_number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except ArithmeticError:
        raise ValueError(f"the exponent of {text[:40]} is too large") from None


def _to_row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_columns([name for name, _ in pairs])
    return dict(pairs)


def _read_csv(file: Path) -> Rows:
    """Reads every cell as text, so that 007, 1.50 and None stay what they are."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        check_columns(table.fieldnames or [], f"{file}: ")
        rows: Rows = []
        for row in table:
            if None in row:
                raise ConfigError(f"{file} line {table.line_num}: more cells than the {len(row) - 1} columns")
            rows.append(row)
        return rows


def _read_arrow(file: Path) -> Rows:
    """Reads a stream of batches, as `datasets` writes it, or Arrow's file format."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            return read_table(pa.ipc.open_stream(source).read_all(), file)
        except pa.ArrowInvalid:
            return read_table(pa.ipc.open_file(source).read_all(), file)


def _read_folder(folder: Path) -> dict[str, Rows]:
    import datasets

    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise ConfigError(
            f"{folder}: a folder without dataset_dict.json or state.json; expected a file in it"
        )
    found = datasets.load_from_disk(str(folder))
    splits = found if isinstance(found, dict) else {"": found}
    return {str(name): read_table(rows.with_format("arrow")[:], folder) for name, rows in splits.items()}


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": read_parquet,
    ".arrow": _read_arrow,
}
"""Ending of a file -> how it is read."""
