"""Files and what is known of them, in arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from torch import Tensor

from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS

UNCHECKED, HEADER, PIXELS = 0, 1, 2
TRAITS = ("animated", "rotated", "transparent")
COLUMNS: dict[str, Any] = {
    "bytes": np.int64,  # the file's size; −1 where it is not known
    "mtime": np.int64,  # ns
    "folder": np.int32,  # which of the folders it lies in
    "checked": np.uint8,  # not yet, its header, or all its pixels
    "fault": np.int32,  # which of the faults it has; 0 for none
    "width": np.int32,  # as it is seen, after EXIF rotation; 0 where it is not known
    "height": np.int32,
    "mode": np.uint8,  # which of the modes
    "traits": np.uint8,  # one bit for each of TRAITS
    "digest": np.int64,  # of its bytes (BLAKE2b); 0 where they were not all read
    **VALUE_COLUMNS,
    **CACHE_COLUMNS,
}


def as_text(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes in it that are no UTF-8 are escaped, E9 as ``\udce9``."""
    return name.encode("utf-8", "backslashreplace").decode()


class FileTable(Sequence[str]):
    """Relative posix paths, and what is known of each file, in arrays: a million Python strings cost each process 100 MB.

    Args:
        columns: an array for each of :data:`COLUMNS`, and ``name``, the paths as bytes.
        rows: the chosen files, int64 of shape (N,); None for all. A selection shares the columns of the whole.
    """

    def __init__(self, columns: dict[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        self.columns, self._rows = columns, rows

    @classmethod
    def of(cls, names: Sequence[str]) -> FileTable:
        """Files of which only the names are known."""
        if isinstance(names, cls):
            return names
        columns = {name: np.zeros(len(names), kind) for name, kind in COLUMNS.items()}
        columns["bytes"] -= 1
        columns["shard"] -= 1
        return cls({"name": np.array([os.fsencode(name) for name in names], np.bytes_), **columns})

    def __len__(self) -> int:
        return len(self.columns["name"] if self._rows is None else self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        names = self.columns["name"]
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return os.fsdecode(names[place if self._rows is None else self._rows[place]])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.column("name"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def column(self, name: str, index: Tensor | None = None) -> np.ndarray:
        """One value for each of the chosen files, or for some of them."""
        rows = self._rows
        if index is not None:
            rows = index.numpy() if rows is None else rows[index.numpy()]
        return self.columns[name] if rows is None else self.columns[name][rows]

    def row(self, place: int, names: Sequence[str]) -> dict[str, int]:
        """Some columns of one file."""
        row = place if self._rows is None else self._rows[place]
        return {name: int(self.columns[name][row]) for name in names}

    def select(self, index: Tensor | np.ndarray) -> FileTable:
        """Some of the chosen files, by their places or as a mask."""
        rows = np.asarray(index)
        rows = rows.nonzero()[0] if rows.dtype == bool else rows
        return FileTable(self.columns, rows if self._rows is None else self._rows[rows])
