"""The contract of a source: numbered samples with, perhaps, labels."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ComponentConfig, ConfigError
from ssl_pipeline.data.decode import decode

Split = Literal["train", "dev", "test"]


class Indexed(ABC):
    """Samples numbered from 0.

    Attributes:
        name: for messages.
        channels: of the images: 1 or 3 in files, any number in memory.
        classes: names, in the order of the labels; None without labels.
        labels: int64 of shape (N,), on the CPU; None without labels.
        domains: int64 of shape (N,), on the CPU: where each image is from; None where that is not known.
        domain_names: in the order of the domains' numbers; None without domains.
        licence: of the images, where known.
        mean: per channel, of values in [0, 1], where known.
        std: per channel, where known.
        pixels: uint8 of shape (N, C, H, W) where all images have one size and are in memory; None where files are decoded.
    """

    name: str
    channels: int
    classes: tuple[str, ...] | None = None
    labels: Tensor | None = None
    domains: Tensor | None = None
    domain_names: tuple[str, ...] | None = None
    licence: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pixels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def open_image(self, index: int) -> Image.Image:
        """One decoded image, in mode ``L`` or ``RGB``."""

    def describe(self, index: int) -> str:
        """What a message calls one sample."""
        return f"image {index} of {self.name}"

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes when the samples or labels do."""

    @abstractmethod
    def select(self, index: Tensor) -> Indexed:
        """The samples of an int64 index, numbered anew from 0."""


class ArraySource(Indexed):
    """Equal-sized images in memory.

    Args:
        name: for messages.
        pixels: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,).
        classes: names, in the order of the labels.
        licence: of the images.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """

    def __init__(
        self,
        name: str,
        pixels: Tensor,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
        licence: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        self.name, self.pixels, self.labels, self.classes, self.licence = name, pixels, labels, classes, licence
        self.channels, self.mean, self.std = pixels.shape[1], mean, std
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def open_image(self, index: int) -> Image.Image:
        """The image as Pillow's."""
        array = self._pixels[index].permute(1, 2, 0).numpy()
        return Image.fromarray(array[:, :, 0] if self.channels == 1 else array)

    def fingerprint(self) -> str:
        """Of the pixels and labels."""
        digest = hashlib.blake2b(self._pixels.numpy().tobytes(), digest_size=16)
        digest.update(b"" if self.labels is None else self.labels.numpy().tobytes())
        return digest.hexdigest()

    def select(self, index: Tensor) -> ArraySource:
        """A copy of the chosen samples."""
        labels = None if self.labels is None else self.labels[index]
        return ArraySource(self.name, self._pixels[index], labels, self.classes, self.licence, self.mean, self.std)

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


class FileSource(Indexed):
    """Image files of any sizes, decoded when they are wanted.

    Args:
        name: for messages.
        root: the folder that all files are in or below.
        files: their posix paths relative to it.
        channels: 1 for grey, 3 for RGB.
        labels: int64 of shape (N,).
        classes: names, in the order of the labels.
        skipped: files that were left out because they are no images.
        domains: int64 of shape (N,).
        domain_names: in the order of the domains' numbers.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        channels: int,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
        skipped: Sequence[str] = (),
        domains: Tensor | None = None,
        domain_names: tuple[str, ...] | None = None,
    ) -> None:
        self.name, self.root, self.files, self.channels = name, root, list(files), channels
        self.labels, self.classes, self.skipped = labels, classes, list(skipped)
        self.domains, self.domain_names = domains, domain_names

    def __len__(self) -> int:
        return len(self.files)

    def open_image(self, index: int) -> Image.Image:
        """The decoded file.

        Raises:
            DecodeError: naming the file.
        """
        return decode(self.root / self.files[index], self.channels)

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        """Of relative paths, sizes and labels; contents are not read.

        Times and the folder's own place do not count, so that a copy on another disk is the same data to a resumed run.

        Raises:
            ConfigError: a file has gone since the folder was read.
        """
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            try:
                size = (self.root / file).stat().st_size
            except OSError as error:
                raise ConfigError(
                    f"{self.root / file} has gone since the folder was read ({error.strerror}): start again."
                ) from error
            digest.update(f"{file}\0{size}\0".encode(errors="surrogateescape"))
        for numbers in (self.labels, self.domains):
            digest.update(b"" if numbers is None else numbers.numpy().tobytes())
        return digest.hexdigest()

    def select(self, index: Tensor) -> FileSource:
        """The chosen files."""
        labels = None if self.labels is None else self.labels[index]
        domains = None if self.domains is None else self.domains[index]
        files = [self.files[i] for i in index.tolist()]
        return FileSource(
            self.name, self.root, files, self.channels, labels, self.classes, self.skipped, domains, self.domain_names
        )


class SourceConfig(ComponentConfig, ABC):
    """The base of every source's ``Config``."""

    @abstractmethod
    def open(self, split: Split) -> Indexed | None:
        """A split; None where this data has none (``dev`` and ``test`` without labels).

        ``dev`` is held out of the training labels for choices; ``test`` is read by the final evaluation alone.
        """
