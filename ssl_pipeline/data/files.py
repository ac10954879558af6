"""Which files a source holds: names and figures in arrays, because a million Python strings cost each process 100 MB."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor


def pack(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Names as bytes, uint8 of shape (total,), and where each ends, int64 of shape (N,)."""
    encoded = [os.fsencode(name) for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    blob = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return torch.from_numpy(blob), torch.from_numpy(ends)


def as_text(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes in it that are no UTF-8 are escaped, E9 as ``\udce9``."""
    return name.encode("utf-8", "backslashreplace").decode()


class FileTable(Sequence[str]):
    """Relative posix paths, and what is known of each file; a selection shares the arrays of the whole.

    Args:
        blob: all names in bytes.
        ends: where each name ends in them.
        columns: per name of a figure one number a file.
        rows: int64 of shape (N,): the chosen files; None for all.
    """

    def __init__(
        self, blob: Tensor, ends: Tensor, columns: Mapping[str, Tensor] | None = None, rows: Tensor | None = None
    ) -> None:
        self._blob, self._ends, self._columns, self._rows = blob, ends, dict(columns or {}), rows

    @classmethod
    def of(cls, names: Sequence[str]) -> FileTable:
        """Names alone."""
        return names if isinstance(names, cls) else cls(*pack(names))

    def __len__(self) -> int:
        return len(self._ends) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return os.fsdecode(self._encoded(self.row(place % len(self))))

    def __iter__(self) -> Iterator[str]:
        encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
        return (name.decode(encoding, errors) for name in self.encoded())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def _encoded(self, row: int) -> bytes:
        start = int(self._ends[row - 1]) if row else 0
        return self._blob[start : int(self._ends[row])].numpy().tobytes()

    def encoded(self) -> Iterator[bytes]:
        """The names as the file system has them."""
        ends = self._ends.numpy()
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        if self._rows is not None:
            starts, ends = starts[self._rows.numpy()], ends[self._rows.numpy()]
        names = self._blob.numpy().data
        return (bytes(names[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True))

    def packed(self) -> tuple[Tensor, Tensor]:
        """All names, not only the chosen, as :func:`pack` has them."""
        return self._blob, self._ends

    def row(self, place: int) -> int:
        """Where a chosen file stands among all."""
        return place if self._rows is None else int(self._rows[place])

    def column(self, name: str) -> Tensor | None:
        """One number a chosen file; None where it is not known."""
        column = self._columns.get(name)
        return column if column is None or self._rows is None else column[self._rows]

    def at(self, name: str, index: Tensor) -> Tensor | None:
        """The numbers of some chosen files, int64; None where they are not known."""
        column = self._columns.get(name)
        return None if column is None else column[index if self._rows is None else self._rows[index]].long()

    def select(self, index: Tensor) -> FileTable:
        """Some of the chosen files, by their places."""
        return FileTable(self._blob, self._ends, self._columns, index if self._rows is None else self._rows[index])

    def with_column(self, name: str, numbers: Tensor) -> FileTable:
        """The same files with other numbers of a kind that is known, one a chosen file."""
        column = numbers
        if self._rows is not None:
            column = self._columns[name].clone()
            column[self._rows] = numbers
        return FileTable(self._blob, self._ends, {**self._columns, name: column}, self._rows)
