"""The contract of a source: the configuration of one kind of data, which opens its splits."""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ComponentConfig, ConfigError
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.encoded import StreamDataset
from ssl_pipeline.data.reading import channels_of
from ssl_pipeline.data.splits import SPLIT_NAMES, Part, Split, split_three
from ssl_pipeline.data.value_range import Range, RangeKey, describe_range, settle
from ssl_pipeline.transforms.config import ViewConfig

LOOKED_AT = 64  # images of a stream that settle what is not given: their channels, their range of values
Streamed = TypeVar("Streamed", bound=StreamDataset)
_SETTLED: dict[str, Range | None] = {}  # once in the process's life, as data are read


class SourceConfig(ComponentConfig, ABC):
    """The base of every source's ``Config``."""

    @abstractmethod
    def open(self, split: Split) -> IndexedDataset | None:
        """A split, the same for every seed; None where this data has none (``val`` and ``test`` without labels).

        ``val`` is held out of the training labels for choices; ``test`` is read by the final evaluation alone.
        """

    def open_pool(self) -> IndexedDataset | None:
        """What stage one learns from: ``train`` and, where ``val`` was drawn from the training images, ``val`` too.

        Stage one reads no labels, so images that only serve choices need not be kept from it; test images are.
        """
        return self.open("train")

    def open_every(self) -> dict[Split, IndexedDataset]:
        """All images by their splits, those without labels too."""
        return {split: source for split in SPLIT_NAMES if (source := self.open(split)) is not None}

    def shown_by_views(self, views: Sequence[ViewConfig], hidden: Collection[str]) -> list[str]:
        """Views that show domains which are not to be seen, as sentences that say so; by default none is known to."""
        del views, hidden
        return []


class DecodedConfig(SourceConfig, ABC):
    """The base of sources whose images are decoded: all parts of them are at one range of values, which none can forget.

    Attributes:
        range: which stored values are black and white in images of more than 8 bits, for all images alike: ``[0, 4095]``;
            ``dtype``, the whole range of the stored type; ``percentiles``, the medians of the images' first and 99th; ``auto``, of
            whole numbers the bits that hold all of them, of floats [0, 1] or as far as they go. Stage two takes stage one's.
        license: of the images, where you know it.
    """

    range: RangeKey = "auto"
    license: str | None = None

    @abstractmethod
    def open_part(self, part: Part, unlabeled: bool = False) -> IndexedDataset | None:
        """A part of the images, at no range of values yet; None where this data has none.

        Args:
            part: which.
            unlabeled: also give ``val`` and ``test`` where nothing could be measured on them.
        """

    def stored_values(self) -> Mapping[str, np.ndarray]:
        """Of images of the training data, by which the range is settled."""
        pool = self.open_part("pool")
        assert pool is not None
        return pool.stored_values()

    def value_range(self) -> Range | None:
        """The values that are black and white; None where no inspected image has more than 8 bits."""
        key = repr(self)
        if key not in _SETTLED:
            _SETTLED[key] = self.range if isinstance(self.range, tuple) else settle(self.range, self.stored_values())
        return _SETTLED[key]

    def open(self, split: Split) -> IndexedDataset | None:
        return self._at_range(split)

    def open_pool(self) -> IndexedDataset | None:
        return self._at_range("pool")

    def open_every(self) -> dict[Split, IndexedDataset]:
        found = ((split, self._at_range(split, unlabeled=True)) for split in SPLIT_NAMES)
        return {split: source for split, source in found if source is not None}

    def _at_range(self, part: Part, unlabeled: bool = False) -> IndexedDataset | None:
        found = self.open_part(part, unlabeled)
        if found is None:
            return None
        source = found.at_range(self.value_range())
        source.license = self.license or source.license
        return source


@dataclass(frozen=True)
class Images:
    """What a source has before any of its images are held out.

    Attributes:
        train: those that are in no other split of the data's own.
        strata: int64 of shape (N,), what the shares of ``train`` are even over; images of −1 are not held out. None where nothing
            could be measured on images: then there is no ``val`` and no ``test``.
        own: opens the splits that the data has of its own.
        chosen: bool of shape (N,), which images of ``train`` are taken, whatever split they are in; None for all.
    """

    train: IndexedDataset
    strata: Tensor | None
    own: Mapping[Split, Callable[[], IndexedDataset | None]] = field(default_factory=dict)
    chosen: Tensor | None = None


class HoldOutConfig(DecodedConfig, ABC):
    """The base of sources of numbered images: where the data has no ``val`` or ``test``, a share of ``train`` is held out.

    Attributes:
        val: the share of labeled training images that is held out for choices where the data has no such split.
        test: the share of labeled training images that is held out for the final results where the data has no such split.
    """

    val: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)

    @abstractmethod
    def read_images(self) -> Images:
        """The images, and which of them are in a split already.

        Raises:
            ConfigError: something is missing, damaged or does not fit.
        """

    def open_part(self, part: Part, unlabeled: bool = False) -> IndexedDataset | None:
        images = self.read_images()
        if part != "pool" and part in images.own and (unlabeled or images.strata is not None):
            return images.own[part]()
        if images.strata is None:
            shares: dict[Part, Tensor] = dict.fromkeys(("train", "pool"), torch.arange(len(images.train)))
        else:
            test, val = (None if "test" in images.own else self.test), (None if "val" in images.own else self.val)
            # The draw has the name of the source's module.
            shares = split_three(images.strata, test, val, type(self).__module__.rpartition(".")[2].replace("_", " "))
        index = shares.get(part, torch.empty(0, dtype=torch.int64))
        if images.chosen is not None:
            index = index[images.chosen[index]]
        if len(index) == 0:
            return None
        source = images.train.select(index)
        if part == "pool" and source.labels is not None:
            # Stage one may learn from images of `val`. A task that reads labels, and kNN's bank, must not have theirs.
            source.labels = source.labels.masked_fill(~torch.isin(index, shares["train"]), -1)
        return source


class StreamConfig(DecodedConfig, ABC):
    """The base of sources whose training images may be a stream: then the first of them settle the range of values.

    Attributes:
        channels: 3 for RGB, 1 for grayscale; null: 1 where the inspected images are all grayscale.
        length: images of a stream, where the data does not declare it; without it the run's length is given as ``steps``.
        shuffle_buffer: images of a stream that a process holds to deal them out in a random order.
        max_val_images: most images of a stream's ``val`` and ``test`` that are read, into memory.
        on_error: what of a stream can't be read, an image or an archive, ``stop`` the run, or is left out (``skip``).
    """

    channels: Literal[1, 3] | None = None
    length: int | None = Field(None, ge=2)
    shuffle_buffer: int = Field(4096, ge=1)
    max_val_images: int = Field(5000, ge=1)
    on_error: Literal["stop", "skip"] = "stop"

    @abstractmethod
    def open_stream(self, split: Split = "train") -> StreamDataset | None:
        """The images of a split that the data has; None where they are numbered, and ``open_part`` gives them."""

    def configured(self, stream: Streamed) -> Streamed:
        """A stream with what the keys say of it; where they do not say its channels, its first images do.

        Raises:
            ConfigError: there is no image.
        """
        stream.length = self.length or stream.length
        stream.block, stream.skip_unreadable = self.shuffle_buffer, self.on_error == "skip"
        if self.channels is not None:
            stream.channels = self.channels
            return stream
        first = list(itertools.islice(stream.samples(), LOOKED_AT))
        if not first:
            raise ConfigError(
                f"{stream.name} holds no image: see `data.image` (in archives images are named KEY.jpg, KEY.png, …)."
            )
        stream.channels = channels_of(first)
        return stream

    def stream(self) -> StreamDataset | None:
        """The training images, at the data's range of values; None where they are numbered."""
        stream = self.open_stream()
        if stream is not None:
            stream.value_range = self.value_range()
        return stream

    def stored_values(self) -> Mapping[str, np.ndarray]:
        """Of the first images of a stream."""
        stream = self.open_stream()
        return super().stored_values() if stream is None else stream.preview(LOOKED_AT).stored_values()

    @abstractmethod
    def has_split(self, split: Split) -> bool:
        """Whether the data has this ``val`` or ``test``."""

    def open_part(self, part: Part, unlabeled: bool = False) -> IndexedDataset | None:
        """``val`` or ``test`` of a stream, in memory.

        Raises:
            ConfigError: it is the training images that are asked for, or the part has images without labels.
        """
        if part == "train" or part == "pool":
            raise ConfigError(
                f"`data={self.name}` is read from front to back, and numbered images are needed here: put them into a folder "
                "or a table (`data=folder`, `data=table`)."
            )
        return _held(self, part) if self.has_split(part) else None


@lru_cache(maxsize=4)
def _held(config: StreamConfig, split: Split) -> IndexedDataset:
    """The first images of a split that is streamed, in memory."""
    train = config.open_stream() if config.channels is None else None
    channels = config.channels if train is None else train.channels  # of the images that the network reads
    stream = config.model_copy(update={"channels": channels}).open_stream(split)
    assert stream is not None
    held = stream.preview(config.max_val_images)
    if held.labels is None:
        raise ConfigError(
            f"`{split}`: the images of {held.name} need labels and names of their classes, as nothing can be measured without: "
            "see `data.label` and, of archives, `data.classes`, or name another split."
        )
    return held


def open_training(config: SourceConfig) -> ImageDataset:
    """What stage one learns from."""
    source = (config.stream() if isinstance(config, StreamConfig) else None) or config.open_pool()
    assert source is not None
    return source


def describe_splits(config: SourceConfig, learned: ImageDataset, val: IndexedDataset | None) -> str:
    """How many images stage one learns from and which are kept from it, in a line."""
    text = f"learned from: {learned.describe_size()}"
    if val is None:
        return f"{text}; there is no `val`, so choices rest on no labels"
    train = config.open("train") if isinstance(learned, IndexedDataset) else None
    shared = train is not None and isinstance(learned, IndexedDataset) and len(train) < len(learned)
    text += f"; for choices (`val`): {len(val)}" + (" of these, by their labels" if shared else ", held out")
    if isinstance(learned, StreamDataset):
        return text
    try:
        test = config.open("test")
    except ConfigError as error:  # stage two tells it; stage one needs no test
        return f"{text}; held out for `test`: not known ({error.problems[0]})"
    return f"{text}; held out for `test`: {'none' if test is None else len(test)}"


def describe_range_of(config: SourceConfig, learned: ImageDataset) -> list[str]:
    """Which stored values are black and white in images of more than 8 bits, in a line; none if there are no such images."""
    if learned.value_range is None:
        return []
    looked = isinstance(learned, StreamDataset) and isinstance(config, DecodedConfig) and isinstance(config.range, str)
    by = f", by the first {LOOKED_AT} images of the stream" if looked else ""
    return [f"of more than 8 bits {describe_range(learned.value_range)}{by}"]


def at_range_of(data: SourceConfig, path: str | None) -> SourceConfig:
    """The data at the range that an encoder or model was trained at, where the user gives none: what was white must stay white.

    ``path`` is a run's folder or a file in it; None, and what is no run of ours, changes nothing.
    """
    if path is None or not isinstance(data, DecodedConfig) or data.range != "auto":
        return data
    place = Path(path).expanduser()
    try:
        card = json.loads(((place if place.is_dir() else place.parent) / "card.json").read_text(encoding="utf-8"))
        found = card["blueprint"].get("range")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # reported where the encoder is opened
        return data
    return data if found is None else data.model_copy(update={"range": (float(found[0]), float(found[1]))})
