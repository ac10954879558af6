"""The contract of a source: numbered samples with, perhaps, labels."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from copy import copy
from typing import Generic, Literal, Self, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.bad_files import BadFiles
from ssl_pipeline.data.files import FileTable
from ssl_pipeline.data.value_range import Range, RangeKey, measured, settle
from ssl_pipeline.transforms.config import ViewConfig

Split = Literal["train", "dev", "test"]
Part = Literal["train", "dev", "test", "pool"]  # pool: what stage one learns from
_SETTLED: dict[str, Range | None] = {}  # once in the process's life, as data are read


class IndexedDataset(ABC):
    """Samples numbered from 0.

    Attributes:
        name: for messages.
        channels: of the images: 1 or 3 in files, any number in memory.
        classes: names, in the order of the labels; None without labels.
        labels: int64 of shape (N,), on the CPU; None without labels.
        unlabeled_because: where there are no labels and the source knows why, a sentence that says so and what to do.
        domains: int64 of shape (N,), on the CPU: where each image is from; None where that is not known.
        domain_names: in the order of the domains' numbers; None without domains.
        license: of the images, where known.
        mean: per channel, of values in [0, 1], where known.
        std: per channel, where known.
        value_range: the stored values that are black and white, where images have more than 8 bits; None where none has.
        pixels: uint8 of shape (N, C, H, W) where all images have one size and are in memory; None where files are decoded.
        bad_files: bears images that can't be decoded, which neighbors then replace; None bears none.
    """

    name: str
    channels: int
    classes: tuple[str, ...] | None = None
    labels: Tensor | None = None
    unlabeled_because: str | None = None
    domains: Tensor | None = None
    domain_names: tuple[str, ...] | None = None
    license: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    value_range: Range | None = None
    pixels: Tensor | None = None
    bad_files: BadFiles | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @property
    def has_domains(self) -> bool:
        """Whether it is known where each image is from."""
        return self.domains is not None

    @property
    def absent_domains(self) -> list[str]:
        """The names of the domains that no sample is from."""
        present = set() if self.domains is None else set(self.domains.tolist())
        return [name for number, name in enumerate(self.domain_names or ()) if number not in present]

    @abstractmethod
    def open_image(self, index: int) -> Image.Image:
        """One decoded image, in mode ``L`` or ``RGB``; in mode ``F``, in [0, 1], if it has more than 8 bits."""

    def open_stored(self, index: int) -> Image.Image:
        """One image with the values that are stored, for a look at them."""
        return self.open_image(index)

    def stored_values(self) -> FileTable:
        """The values of a few images spread over all, with the columns of :mod:`~ssl_pipeline.data.value_range`."""
        return measured(self.open_stored, len(self), self.name)

    def at_range(self, value_range: Range | None) -> Self:
        """The same samples, decoded at a range of values."""
        source = copy(self)
        source.value_range = value_range
        return source

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Heights and widths of samples before they are decoded, int64 of shape (B,); None where only decoding tells."""
        del index
        return None

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        """One decoded image, perhaps at 1/2, 1/4 or 1/8 of its size, where that is faster; never less than 1/factor."""
        del factor
        return self.open_image(index)

    def neighbor(self, index: int) -> int:
        """Which sample takes the place of one that can't be decoded: the next, or with labels the next of its class."""
        if self.labels is None:
            return (index + 1) % len(self)
        alike = (self.labels == self.labels[index]).nonzero()[:, 0]
        return int(alike[torch.searchsorted(alike, index, right=True) % len(alike)])

    def describe(self, index: int) -> str:
        """What a message calls one sample."""
        return f"image {index} of {self.name}"

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes when the samples or labels do."""

    @abstractmethod
    def select(self, index: Tensor) -> Self:
        """The samples of an int64 index, numbered anew from 0.

        A source calls this for labels, domains and all that is known of the whole, and selects what else it holds per sample.
        """
        chosen = copy(self)
        chosen.labels = None if self.labels is None else self.labels[index]
        chosen.domains = None if self.domains is None else self.domains[index]
        return chosen


class ArrayDataset(IndexedDataset):
    """Equal-sized images in memory.

    Args:
        name: for messages.
        pixels: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,).
        classes: names, in the order of the labels.
        license: of the images.
        mean: per channel, of values in [0, 1].
        std: per channel.
        domains: int64 of shape (N,).
        domain_names: in the order of the domains' numbers.
    """

    def __init__(
        self,
        name: str,
        pixels: Tensor,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
        license: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        domains: Tensor | None = None,
        domain_names: tuple[str, ...] | None = None,
    ) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        self.name, self.pixels, self.labels, self.classes, self.license = name, pixels, labels, classes, license
        self.channels, self.mean, self.std = pixels.shape[1], mean, std
        self.domains, self.domain_names = domains, domain_names
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def open_image(self, index: int) -> Image.Image:
        """The image as Pillow's."""
        array = self._pixels[index].permute(1, 2, 0).numpy()
        return Image.fromarray(array[:, :, 0] if self.channels == 1 else array)

    def fingerprint(self) -> str:
        """Of the pixels, labels and domains."""
        digest = hashlib.blake2b(self._pixels.numpy().tobytes(), digest_size=16)
        for numbers in (self.labels, self.domains):
            digest.update(b"" if numbers is None else numbers.numpy().tobytes())
        return digest.hexdigest()

    def select(self, index: Tensor) -> Self:
        """A copy of the chosen samples."""
        chosen = super().select(index)
        chosen.pixels = chosen._pixels = self._pixels[index]
        return chosen

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation of values in [0, 1]."""
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self._pixels.unbind(1):
            # Counted, because the pixels themselves in double precision would take eight times their memory.
            counts = channel.flatten().bincount(minlength=256).double()
            mean = (counts * values).sum() / counts.sum()
            variance = (counts * (values - mean).square()).sum() / (counts.sum() - 1)
            means.append(float(mean))
            stds.append(float(variance.sqrt()))
        return tuple(means), tuple(stds)


class SourceConfig(ComponentConfig, ABC):
    """The base of every source's ``Config``."""

    @abstractmethod
    def open(self, split: Split) -> IndexedDataset | None:
        """A split; None where this data has none (``dev`` and ``test`` without labels).

        ``dev`` is held out of the training labels for choices; ``test`` is read by the final evaluation alone.
        """

    def open_pool(self) -> IndexedDataset | None:
        """What stage one learns from: ``train`` and, where ``dev`` was drawn from the training images, ``dev`` too.

        Stage one reads no labels, so images that only serve choices need not be kept from it; test images are.
        """
        return self.open("train")

    def open_every(self) -> dict[Split, IndexedDataset]:
        """All images by their splits, those without labels too."""
        splits: tuple[Split, ...] = ("train", "dev", "test")
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
        splits: tuple[Split, ...] = ("train", "dev", "test")
        return {split: part for split in splits if (part := self.open_part(split)) is not None}

    def stored_values(self) -> FileTable:
        """Of images of the training data, by which the range is settled."""
        pool = self.open_part("pool")
        assert pool is not None
        return pool.stored_values()

    def value_range(self) -> Range | None:
        """The values that are black and white; None where no image that was looked at has more than 8 bits."""
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
