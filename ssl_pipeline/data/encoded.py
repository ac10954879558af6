"""Datasets of images that come as the bytes of a file: streams of shards, read from front to back, and numbered ones."""

from __future__ import annotations

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.decode import DecodeError, EncodedImage


class EncodedDataset(IndexedDataset):
    """Samples that come as the bytes of an image file, in memory or in a table's cells."""

    _opened: dict[int, EncodedImage] | None = None  # the images of :meth:`sizes`

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of one image file."""

    def _open(self, index: int) -> EncodedImage:
        return EncodedImage(self.encoded(index), Path(self.describe(index)))

    def open_image(self, index: int) -> Image.Image:
        return self._open(index).decode(self.channels, 1, self.value_range)

    def open_stored(self, index: int) -> Image.Image:
        return Image.open(BytesIO(self.encoded(index)))

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Heights and widths from the headers, 1 by 1 where one can't be read; the images stay open to be decoded next."""
        self._opened = opened = dict[int, EncodedImage]()
        for i in index.tolist():
            with suppress(DecodeError):  # decoding raises it again
                opened[i] = self._open(i)
        found = [(opened[i].height, opened[i].width) if i in opened else (1, 1) for i in index.tolist()]
        heights, widths = torch.tensor(found).unbind(1)
        return heights, widths

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        opened = self._opened.pop(index, None) if self._opened else None
        return (opened or self._open(index)).decode(self.channels, factor, self.value_range)

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen._opened = None
        return chosen


@dataclass(frozen=True)
class Sample:
    """A sample of a shard, not decoded yet.

    Attributes:
        position: its place among the shard's samples, from 0.
        data: the image file.
        label: the number of its class; None where it has none.
        name: what a message calls it.
        domain: the name of where it is from; None where that is not known.
    """

    position: int
    data: bytes
    label: int | None
    name: str
    domain: str | None = None


class StreamDataset(ImageDataset):
    """Shards of samples, read from front to back.

    There is no ``len``: a task that keeps a row per image can't take it.

    Attributes:
        shards: their names, each once and without their folder: ids are made of them.
        has_domains: whether samples say where they are from. Nobody has read all names, so a domain's number is 63 bits of its
            name.
        length: samples of all shards, as far as it is known.
        block: samples that a process holds to be shuffled, encoded.
        skip_unreadable: whether an image that can't be decoded is left out rather than an error.
    """

    shards: tuple[str, ...]
    has_domains: bool = False
    length: int | None = None
    block: int = 4096
    skip_unreadable: bool = False

    @abstractmethod
    def read(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """A shard's samples in their order, from a position on; what comes before costs as little as can be.

        Raises:
            UserError: the shard is missing or damaged.
        """

    def samples(self) -> Iterator[Sample]:
        """All samples, a shard after the other."""
        return itertools.chain.from_iterable(self.read(shard) for shard in range(len(self.shards)))

    @abstractmethod
    def size(self, shard: int) -> int:
        """How many samples :meth:`read` gives; counted where it is recorded nowhere."""

    def describe_size(self) -> str:
        return f"{self.length or 'uncounted'} images in {len(self.shards)} shard(s)"

    def preview(self, count: int = 1024) -> InMemoryDataset:
        """The first samples, held in memory.

        Where training leaves out what can't be decoded, a neighbor takes its place here.
        """
        held = InMemoryDataset(self.name, list(itertools.islice(self.samples(), count)), self.channels, self.classes)
        held.value_range = self.value_range
        if self.skip_unreadable:
            held.bad_files = BadFiles(parse_limit("100%"), len(held))
        return held


class InMemoryDataset(EncodedDataset):
    """A few encoded images in memory; labels are known if all of them have one.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, name: str, samples: list[Sample], channels: int, classes: tuple[str, ...] | None = None) -> None:
        if not samples:
            raise ConfigError(f"{name} holds no image: see the keys of `data` in `configs/data`.")
        self.name, self.channels, self.classes, self._samples = name, channels, classes, samples
        labels = [sample.label for sample in samples if sample.label is not None]
        if classes is not None and len(labels) == len(samples):
            self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self._samples)

    def encoded(self, index: int) -> bytes:
        return self._samples[index].data

    def describe(self, index: int) -> str:
        return self._samples[index].name

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for sample in self._samples:
            digest.update(hashlib.blake2b(sample.data).digest() + str(sample.label).encode())
        return digest.hexdigest()

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen._samples = [self._samples[i] for i in index.tolist()]
        return chosen
