"""The contract of a source that is read from front to back: shards of encoded images."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
from ssl_pipeline.data.decode import GRAYSCALE_MODES, EncodedImage
from ssl_pipeline.data.files import FileTable
from ssl_pipeline.data.source import DecodedConfig, IndexedDataset, SourceConfig
from ssl_pipeline.data.value_range import Range, describe_range

LOOKED_AT = 64  # images that say whether all are grayscale


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


class StreamDataset(ABC):
    """Shards of samples, read from front to back.

    There is no ``len``: a task that keeps a row per image can't take it.

    Attributes:
        name: for messages.
        shards: their names, each once and without the place they lie at: ids are made of them.
        channels: 1 or 3.
        classes: names, in the order of the labels; None where they are not declared.
        has_domains: whether samples say where they are from. Nobody has read all names, so a domain's number is 63 bits of its
            name.
        length: samples of all shards, as far as it is known.
        block: samples that a process holds to be shuffled, encoded.
        skip_unreadable: whether an image that can't be decoded is left out rather than an error.
        license: of the images, where known.
        mean: per channel, of values in [0, 1], where known.
        std: per channel, where known.
        value_range: the stored values that are black and white, where images have more than 8 bits; None where none has.
    """

    name: str
    shards: tuple[str, ...]
    channels: int
    classes: tuple[str, ...] | None = None
    has_domains: bool = False
    length: int | None = None
    block: int = 4096
    skip_unreadable: bool = False
    license: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    value_range: Range | None = None

    @abstractmethod
    def read(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """A shard's samples in their order, from a position on; what comes before costs as little as can be.

        Raises:
            UserError: the shard is missing or damaged.
        """

    @abstractmethod
    def size(self, shard: int) -> int:
        """How many samples :meth:`read` gives; counted where it is recorded nowhere."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes when the shards do, as far as can be told without reading them."""

    def head(self, count: int) -> InMemoryDataset:
        """The first samples, as they lie, held in memory: something to look at while training runs.

        Where training leaves out what can't be decoded, a neighbor takes its place here.
        """
        every = itertools.chain.from_iterable(self.read(shard) for shard in range(len(self.shards)))
        held = InMemoryDataset(self.name, list(itertools.islice(every, count)), self.channels, self.classes)
        held.value_range = self.value_range
        if self.skip_unreadable:
            held.bad_files = BadFiles(parse_limit("100%"), len(held))
        return held


class InMemoryDataset(IndexedDataset):
    """A few encoded images in memory.

    Args:
        name: for messages.
        samples: the images; labels are known if all of them have one.
        channels: 1 or 3.
        classes: names, in the order of the labels.

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

    def open_image(self, index: int) -> Image.Image:
        """The decoded image."""
        sample = self._samples[index]
        return EncodedImage(sample.data, Path(sample.name)).decode(self.channels, 1, self.value_range)

    def open_stored(self, index: int) -> Image.Image:
        """The image with the values that are stored."""
        return Image.open(BytesIO(self._samples[index].data))

    def describe(self, index: int) -> str:
        """The sample's name in its shard."""
        return self._samples[index].name

    def fingerprint(self) -> str:
        """Of all bytes and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self._samples:
            digest.update(hashlib.blake2b(sample.data).digest() + str(sample.label).encode())
        return digest.hexdigest()

    def select(self, index: Tensor) -> Self:
        """The chosen samples."""
        chosen = super().select(index)
        chosen._samples = [self._samples[i] for i in index.tolist()]
        return chosen


class StreamConfig(DecodedConfig[IndexedDataset | None], ABC):
    """The base of sources whose training images may be a stream: then the first of them settle the range of values."""

    @abstractmethod
    def open_stream(self) -> StreamDataset | None:
        """The training images; None where they are numbered, and ``open_part`` gives them."""

    def stream(self) -> StreamDataset | None:
        """The training images, at the data's range of values; None where they are numbered."""
        stream = self.open_stream()
        if stream is not None:
            stream.value_range = self.value_range()
        return stream

    def stored_values(self) -> FileTable:
        """Of the first images of a stream."""
        stream = self.open_stream()
        return super().stored_values() if stream is None else stream.head(LOOKED_AT).stored_values()

    def refuse_numbers(self) -> ConfigError:
        """What ``open("train")`` raises of a stream."""
        return ConfigError(
            f"`data={self.name}` is read from front to back, and numbered images are needed here: put them into a folder or "
            "a table (`data=folder`, `data=table`)."
        )


def open_training(config: SourceConfig) -> IndexedDataset | StreamDataset:
    """What stage one learns from."""
    source = (config.stream() if isinstance(config, StreamConfig) else None) or config.open_pool()
    assert source is not None
    return source


def describe_splits(config: SourceConfig, learned: IndexedDataset | StreamDataset, dev: IndexedDataset | None) -> str:
    """How many images stage one learns from and which are kept from it, in a line."""
    told = f"learned from: {describe_size(learned)}"
    if dev is None:
        return f"{told}; there is no `dev`, so choices rest on no labels"
    train = config.open("train") if isinstance(learned, IndexedDataset) else None
    shared = train is not None and isinstance(learned, IndexedDataset) and len(train) < len(learned)
    told += f"; for choices (`dev`): {len(dev)}" + (" of these, by their labels" if shared else ", held out")
    if isinstance(learned, StreamDataset):
        return told
    try:
        test = config.open("test")
    except ConfigError as error:  # stage two tells it; stage one needs no test
        return f"{told}; held out for `test`: not known ({error.problems[0]})"
    return f"{told}; held out for `test`: {'none' if test is None else len(test)}"


def describe_range_of(config: SourceConfig, learned: IndexedDataset | StreamDataset) -> list[str]:
    """Which stored values are black and white in images of more than 8 bits, in a line; none if there are no such images."""
    if learned.value_range is None:
        return []
    looked = isinstance(learned, StreamDataset) and isinstance(config, DecodedConfig) and isinstance(config.range, str)
    by = f", by the first {LOOKED_AT} images of the stream" if looked else ""
    return [f"of more than 8 bits {describe_range(learned.value_range)}{by}"]


def known_length(source: IndexedDataset | StreamDataset) -> int | None:
    """How many samples there are; None where a stream does not know."""
    return source.length if isinstance(source, StreamDataset) else len(source)


def describe_size(source: IndexedDataset | StreamDataset) -> str:
    """How much there is, in words."""
    if isinstance(source, IndexedDataset):
        return f"{len(source)} images"
    return f"{source.length or 'uncounted'} images in {len(source.shards)} shard(s)"


def preview(source: IndexedDataset | StreamDataset, count: int = 1024) -> IndexedDataset:
    """What figures are taken of while training runs: the whole source, or the first images of a stream."""
    return source.head(count) if isinstance(source, StreamDataset) else source


def channels_of(samples: Sequence[Sample]) -> int:
    """What a few images say of all: 1 if they are all grayscale, 3 otherwise. One alone may be the only grayscale one.

    Raises:
        ConfigError: none of them is an image.
    """
    found = set[int]()
    for sample in samples:
        # Decoders answer damaged bytes with nearly any error; training tells it when the image's turn comes.
        with suppress(Exception), Image.open(BytesIO(sample.data)) as image:
            found.add(1 if image.mode.split(";")[0] in GRAYSCALE_MODES else 3)
    if not found:
        raise ConfigError(
            f"{samples[0].name} can't be read as an image, so its channels are not known: set `data.channels`, or mend it."
        )
    return max(found)
