"""Reads what W&B writes on this machine: run-<id>.wandb, the log that `wandb sync` uploads. No torch."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
_FULL, _LAST = 1, 4


def frames(path: Path) -> Iterator[bytes]:
    """The messages of a .wandb file as far as they are whole.

    After 7 bytes of W&B's own the file is a LevelDB log: blocks of 32 KiB, in each pieces of messages behind
    7 bytes of checksum (4), length (2) and kind (1: whole, 2, 3, 4: first, middle, last piece).
    """
    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position <= len(data) and kind in (_FULL, _LAST):
            yield message
            message = b""


def records(path: Path) -> Iterator[Any]:
    """The same, decoded (`wandb_internal_pb2.Record`)."""
    yield from map(_decode, frames(path))


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The logged rows with W&B's own `_step`, `_timestamp` and `_runtime`; a number may be NaN."""
    for record in records(path):
        if items := record.history.item:
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def is_whole(path: Path) -> bool:
    """True if the run has ended and its last record, which says so, is there."""
    last = b""
    for message in frames(path):
        last = message
    return _decode(last).WhichOneof("record_type") == "exit"


def _decode(message: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2

    return vars(wandb_internal_pb2)["Record"].FromString(message)
