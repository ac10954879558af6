"""The contract of a dataset: numbered samples; a stream of shards (``encoded.py``) shares what both have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.data.bad_files import BadFiles
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.targets import Annotations
from ssl_pipeline.data.value_range import Range, measured

NEIGHBORS = 64  # that are tried in the place of an image that can't be decoded


class ImageDataset(ABC):
    """What numbered datasets and streams have in common.

    Attributes:
        name: for messages.
        channels: of the images: 1 or 3 in files, any number in memory.
        classes: names, in the order of the labels; None without labels, or where a stream does not declare them.
        license: of the images, where known.
        mean: per channel, of values in [0, 1], where known.
        std: per channel, where known.
        value_range: the stored values that are black and white, where images have more than 8 bits; None where none has.
    """

    name: str
    channels: int
    classes: tuple[str, ...] | None = None
    license: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    value_range: Range | None = None

    @property
    @abstractmethod
    def length(self) -> int | None:
        """How many samples there are; None where a stream does not know."""

    @property
    @abstractmethod
    def has_domains(self) -> bool:
        """Whether it is known where each image is from."""

    @abstractmethod
    def describe_size(self) -> str:
        """How much there is, in words."""

    @abstractmethod
    def preview(self, count: int = 1024) -> IndexedDataset:
        """What metrics are computed on while training runs: the whole dataset, or the first images of a stream."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes when the samples or labels do, as far as a stream can tell without being read."""


class IndexedDataset(ImageDataset):
    """Samples numbered from 0.

    Attributes:
        labels: int64 of shape (N,), on the CPU; None without labels.
        unlabeled_because: where there are no labels and the source knows why, a sentence that says so and what to do.
        domains: int64 of shape (N,), on the CPU: where each image is from; None where that is not known.
        domain_names: in the order of the domains' numbers; None without domains.
        pixels: uint8 of shape (N, C, H, W) where all images have one size and are in memory; None where files are decoded.
        annotations: numbers, a mask or boxes beside each image; None without. With them there are no labels and no domains.
        bad_files: counts images that can't be decoded, which neighbors then replace; None where the first one is an error.
    """

    labels: Tensor | None = None
    unlabeled_because: str | None = None
    domains: Tensor | None = None
    domain_names: tuple[str, ...] | None = None
    pixels: Tensor | None = None
    annotations: Annotations | None = None
    bad_files: BadFiles | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def length(self) -> int:
        return len(self)

    @property
    def has_domains(self) -> bool:
        return self.domains is not None

    def describe_size(self) -> str:
        return f"{len(self)} images"

    def preview(self, count: int = 1024) -> IndexedDataset:
        del count
        return self

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

    def stored_values(self) -> Mapping[str, np.ndarray]:
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

    def note_bad(self, index: int, error: DecodeError) -> None:
        """Counts a sample that can't be decoded.

        Raises:
            DecodeError: none is allowed.
            ConfigError: no more are allowed.
        """
        if self.bad_files is None:
            raise error
        self.bad_files.note(self.describe(index), error.fault)

    def open_readable(self, index: int) -> Image.Image | None:
        """A decoded image; None for one that can't be decoded, which is counted by :meth:`note_bad`.

        Metrics and probes leave such an image out: a neighbor would be measured against another image's target.
        """
        try:
            return self.open_image(index)
        except DecodeError as error:
            self.note_bad(index, error)
            return None

    def open_or_replace(self, index: int) -> Image.Image:
        """A decoded image, or that of the nearest neighbor, of the same class, that can be decoded.

        Raises:
            UserError: as :meth:`note_bad`, or the neighbors can't be decoded either.
        """
        for _ in range(NEIGHBORS):
            try:
                return self.open_image(index)
            except DecodeError as error:
                self.note_bad(index, error)
                index, last = self.neighbor(index), error
        raise last

    def describe(self, index: int) -> str:
        """What a message calls one sample."""
        return f"image {index} of {self.name}"

    def with_annotations(self, annotations: Annotations) -> Self:
        """The same images with annotations beside them, and without labels, so that stage one reads them like any images."""
        assert len(annotations) == len(self)
        source = copy(self)
        source.labels = source.domains = source.domain_names = None
        source.annotations, source.classes = annotations, annotations.names
        return source

    def finish_fingerprint(self, digest: hashlib.blake2b) -> str:
        """A fingerprint of images to which labels, domains and annotations are added."""
        for numbers in (self.labels, self.domains):
            digest.update(b"" if numbers is None else numbers.numpy().tobytes())
        if self.annotations is not None:
            digest = hashlib.blake2b(digest.hexdigest().encode() + self.annotations.digest(), digest_size=16)
        return digest.hexdigest()

    @abstractmethod
    def select(self, index: Tensor) -> Self:
        """The samples of an int64 index, numbered anew from 0.

        This selects labels, domains and annotations, and keeps all that is known of the whole; a subclass adds what else it holds per sample.
        """
        chosen = copy(self)
        chosen.labels = None if self.labels is None else self.labels[index]
        chosen.domains = None if self.domains is None else self.domains[index]
        chosen.annotations = None if self.annotations is None else self.annotations.select(index)
        return chosen


Kind = TypeVar("Kind", bound=Annotations)


def annotations_of(source: IndexedDataset, kind: type[Kind]) -> Kind | None:
    """A source's annotations of a kind; None if it has none of that kind."""
    return source.annotations if isinstance(source.annotations, kind) else None


class ArrayDataset(IndexedDataset):
    """Equal-sized images in memory: ``pixels`` is uint8 of shape (N, C, H, W); for the rest see :class:`IndexedDataset`."""

    pixels: Tensor

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

    def __len__(self) -> int:
        return len(self.pixels)

    def open_image(self, index: int) -> Image.Image:
        array = self.pixels[index].permute(1, 2, 0).numpy()
        return Image.fromarray(array[:, :, 0] if self.channels == 1 else array)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.pixels.numpy().tobytes(), digest_size=16)
        return self.finish_fingerprint(digest)

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen.pixels = self.pixels[index]
        return chosen

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation of values in [0, 1]."""
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.pixels.unbind(1):
            # Counted, because the pixels themselves in double precision would take eight times their memory.
            counts = channel.flatten().bincount(minlength=256).double()
            mean = (counts * values).sum() / counts.sum()
            variance = (counts * (values - mean).square()).sum() / (counts.sum() - 1)
            means.append(float(mean))
            stds.append(float(variance.sqrt()))
        return tuple(means), tuple(stds)
