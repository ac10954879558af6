"""The contract of a source: the configuration of one kind of data, which opens its splits."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast

import numpy as np

from ssl_pipeline.config.base import ComponentConfig, ConfigError
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.encoded import StreamDataset
from ssl_pipeline.data.value_range import Range, RangeKey, describe_range, settle
from ssl_pipeline.transforms.config import ViewConfig

Split = Literal["train", "val", "test"]
Part = Literal["train", "val", "test", "pool"]  # pool: what stage one learns from
LOOKED_AT = 64  # images of a stream that settle what is not given: their channels, their range of values
_SETTLED: dict[str, Range | None] = {}  # once in the process's life, as data are read


class SourceConfig(ComponentConfig, ABC):
    """The base of every source's ``Config``."""

    @abstractmethod
    def open(self, split: Split) -> IndexedDataset | None:
        """A split; None where this data has none (``val`` and ``test`` without labels).

        ``val`` is held out of the training labels for choices; ``test`` is read by the final evaluation alone.
        """

    def open_pool(self) -> IndexedDataset | None:
        """What stage one learns from: ``train`` and, where ``val`` was drawn from the training images, ``val`` too.

        Stage one reads no labels, so images that only serve choices need not be kept from it; test images are.
        """
        return self.open("train")

    def open_every(self) -> dict[Split, IndexedDataset]:
        """All images by their splits, those without labels too."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        return {split: source for split in splits if (source := self.open(split)) is not None}

    def shown_by_views(self, views: Sequence[ViewConfig], hidden: Collection[str]) -> list[str]:
        """Views that show domains which are not to be seen, as sentences that say so; by default none is known to.

        Args:
            views: the policy of every view.
            hidden: the domains' names.
        """
        del views, hidden
        return []


Opened = TypeVar("Opened", bound="IndexedDataset | None", covariant=True)


class DecodedConfig(SourceConfig, ABC, Generic[Opened]):
    """The base of sources whose images are decoded: all parts of them are at one range of values, which none can forget.

    Attributes:
        range: which stored values are black and white in images of more than 8 bits, for all images alike: ``[0, 4095]``;
            ``dtype``, the whole range of the stored type; ``percentiles``, the medians of the images' first and 99th; ``auto``, of
            whole numbers the bits that hold all of them, of floats [0, 1] or as far as they go. Stage two takes stage one's.
    """

    range: RangeKey = "auto"

    @abstractmethod
    def open_part(self, part: Part) -> Opened:
        """A part of the images; None where this data has none. Its range is settled by :meth:`open` and :meth:`open_pool`."""

    def open_parts(self) -> dict[Split, IndexedDataset]:
        """All images by their splits; likewise."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        return {split: part for split in splits if (part := self.open_part(split)) is not None}

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

    def open(self, split: Split) -> Opened:
        """A split, the same for every seed, at the data's range of values.

        Raises:
            ConfigError: as :meth:`open_part`.
        """
        return self._at_range(self.open_part(split))

    def open_pool(self) -> Opened:
        """All training images but those of the test, at the data's range of values."""
        return self._at_range(self.open_part("pool"))

    def open_every(self) -> dict[Split, IndexedDataset]:
        """All images by their splits, at the data's range of values."""
        return {split: part.at_range(self.value_range()) for split, part in self.open_parts().items()}

    def _at_range(self, part: IndexedDataset | None) -> Opened:
        return cast(Opened, None if part is None else part.at_range(self.value_range()))


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

    def stored_values(self) -> Mapping[str, np.ndarray]:
        """Of the first images of a stream."""
        stream = self.open_stream()
        return super().stored_values() if stream is None else stream.preview(LOOKED_AT).stored_values()

    def refuse_numbers(self) -> ConfigError:
        """What ``open("train")`` raises of a stream."""
        return ConfigError(
            f"`data={self.name}` is read from front to back, and numbered images are needed here: put them into a folder or "
            "a table (`data=folder`, `data=table`)."
        )


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

    Args:
        data: the configuration of a source.
        path: a run's folder or a file in it; None, and what is no run of ours, changes nothing.
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
