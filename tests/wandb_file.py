"""Reads the file that W&B's service writes, with W&B's own message types and nothing else of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

_BLOCK, _FILE_HEADER, _RECORD_HEADER = 32_768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = range(1, 5)


def records(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file, which is a LevelDB log behind a header of its own."""
    found = []
    for data in _pieces(path.read_bytes()):
        record: Any = messages.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        found.append(record)
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary a call; nested names are joined by dots."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def _pieces(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, whole = _FILE_HEADER, b""
    while place + _RECORD_HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _RECORD_HEADER:  # a header never stands across two blocks
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            return
        part = data[place + _RECORD_HEADER : place + _RECORD_HEADER + length]
        place += _RECORD_HEADER + length
        whole = part if kind in (_FULL, _FIRST) else whole + part
        if kind in (_FULL, _LAST):
            yield whole
