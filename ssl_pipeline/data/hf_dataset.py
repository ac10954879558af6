"""Rows of a Hugging Face dataset as images: numbered, or as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import fsspec
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.columns import (
    class_name,
    class_names,
    class_number,
    number_names,
    numbers_of,
    refuse_several,
    text_of,
)
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.encoded import EncodedDataset, Sample, StreamDataset
from ssl_pipeline.rng import derive_seed

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def encoded(cell: Any, name: str) -> bytes:
    """The image file of a cell, which holds its bytes, or its path, or is its bytes.

    Raises:
        ConfigError: it is none of these.
        DecodeError: the path leads nowhere.
    """
    if isinstance(cell, bytes):
        return cell
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, None)
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str):
        raise ConfigError(f"{name} holds no image but {type(cell).__name__}: name the images' column by `data.image`.")
    try:
        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
            return content
    except OSError as error:
        raise DecodeError(Path(name), f"its file {path!r} can't be opened ({error.strerror or error})") from error


@dataclass(frozen=True)
class ColumnNames:
    """Which columns hold the images, their labels and their domains."""

    image: str
    label: str | None
    domain: str | None


class HFDataset(EncodedDataset):
    """Numbered rows, whose images in the column ``image`` are decoded when they are wanted."""

    def __init__(self, name: str, rows: Dataset, image: str, channels: int) -> None:
        self.name, self.channels, self._rows, self._image = name, channels, rows, image
        self.license = rows.info.license or None
        self._index = torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self._index)

    def encoded(self, index: int) -> bytes:
        return encoded(self._rows[int(self._index[index])][self._image], self.describe(index))

    def describe(self, index: int) -> str:
        return f"{self.name}/row {int(self._index[index])}"

    def fingerprint(self) -> str:
        """Of the images' sizes in bytes, or their paths, and of labels; contents are not read."""
        digest = hashlib.blake2b(_marks(self._rows, self._image)[self._index].numpy().tobytes(), digest_size=16)
        return self.finish_fingerprint(digest)

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen._index = self._index[index]
        return chosen


def _marks(rows: Dataset, image: str) -> Tensor:
    """Per row the image's size in bytes, or a number of its path: int64 of shape (N,), read without touching the bytes."""
    from pyarrow import compute

    marks: list[int] = []
    for table in rows.select_columns([image]).with_format("arrow").iter(1000):
        cells = table.column(image).combine_chunks()
        is_struct = hasattr(cells, "field")
        sizes = compute.binary_length(cells.field("bytes") if is_struct else cells).to_pylist()
        paths = cells.field("path").to_pylist() if is_struct else [None] * len(sizes)
        marks += [derive_seed(str(path)) if size is None else size for size, path in zip(sizes, paths, strict=True)]
    return torch.tensor(marks, dtype=torch.int64)


class HFIterableDataset(StreamDataset):
    """Rows of shards, read from front to back; ``classes`` are the names of the labels' numbers, where declared."""

    def __init__(self, name: str, rows: IterableDataset, columns: ColumnNames, classes: tuple[str, ...] | None) -> None:
        self.name, self.classes, self.license = name, classes, rows.info.license or None
        self.shards = tuple(str(number) for number in range(rows.num_shards))
        self.has_domains = columns.domain is not None
        self._rows, self._columns, self._sizes = rows, columns, dict[int, int]()

    def _shard(self, shard: int) -> IterableDataset:
        return self._rows.shard(num_shards=len(self.shards), index=shard)

    def read(self, shard: int, start: int = 0) -> Iterator[Sample]:
        rows, position = self._shard(shard), start
        rows = rows.skip(start) if start else rows
        # By batches: a row-wise loop in a worker would deal the shards out among the workers once more.
        for batch in _reworded(self.name, rows.iter(batch_size=32)):
            cells, none = batch[self._columns.image], [None] * len(batch[self._columns.image])
            labels, domains = (batch.get(column, none) for column in (self._columns.label, self._columns.domain))
            for cell, label, domain in zip(cells, labels, domains, strict=True):
                name = f"{self.name}/shard {shard}/row {position}"
                number = class_number(label, self.classes, str(self._columns.label), name)
                yield Sample(position, encoded(cell, name), number, name, class_name(text_of(domain)))
                position += 1

    def size(self, shard: int) -> int:
        """Counted by the rows of one column, once."""
        if shard not in self._sizes:
            column = self._columns.label or self._columns.image
            batches = self._shard(shard).select_columns([column]).iter(batch_size=1000)
            self._sizes[shard] = sum(len(batch[column]) for batch in _reworded(self.name, batches))
        return self._sizes[shard]

    def fingerprint(self) -> str:
        """Of the dataset's name, the number of its shards and its declared size."""
        text = f"{self.name}\0{len(self.shards)}\0{self.length}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _reworded(name: str, batches: Iterator[Any]) -> Iterator[Any]:
    """Batches; an error about damaged files or a lost connection becomes a sentence."""
    try:
        yield from batches
    except Exception as error:  # pyarrow's, aiohttp's, datasets' own
        raise ConfigError(f"{name} can't be read on: {type(error).__name__}: {error}") from error


def numbers(rows: Dataset, column: str, known: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
    """A column's values as numbers, and their names; ``known`` are those of the training rows.

    Raises:
        ConfigError: a value is not among the known names.
    """
    values = rows.select_columns([column])[:][column]
    declared = getattr(rows.features[column], "names", None)
    if declared is not None:
        # −1 is how published test sets say that they keep a label to themselves.
        return torch.tensor([-1 if value is None else value for value in values]), tuple(declared)
    for value in values:
        refuse_several(value, column, "the dataset")
    texts = class_names([text_of(value) for value in values], column, "the dataset")
    if known is None:
        return number_names(texts)
    unseen = sorted({text for text in texts if text is not None and text not in known})
    if unseen:
        raise ConfigError(
            f"column {column!r} has values that no training row has: {', '.join(unseen[:10])} ({len(unseen)} in all). Nothing "
            "could learn them: name another split."
        )
    return numbers_of(texts, known), known
