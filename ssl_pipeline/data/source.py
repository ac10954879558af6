"""The contract of a source: numbered samples with, perhaps, labels."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ComponentConfig, ConfigError
from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.cache import Cache, CacheError
from ssl_pipeline.data.decode import DecodeError, check_header, decode
from ssl_pipeline.data.files import Files
from ssl_pipeline.views.config import ViewConfig

Split = Literal["train", "dev", "test"]
_log = logging.getLogger("ssl_pipeline")


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
        bad_files: bears images that can't be decoded, which neighbours then replace; None bears none.
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
    bad_files: BadFiles | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @property
    def absent_domains(self) -> list[str]:
        """The names of the domains that no sample is from."""
        present = set() if self.domains is None else set(self.domains.tolist())
        return [name for number, name in enumerate(self.domain_names or ()) if number not in present]

    @abstractmethod
    def open_image(self, index: int) -> Image.Image:
        """One decoded image, in mode ``L`` or ``RGB``."""

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Heights and widths of samples before they are decoded, int64 of shape (B,); None where only decoding tells."""
        del index
        return None

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        """One decoded image, perhaps at 1/2, 1/4 or 1/8 of its size, where that is faster; never less than 1/factor."""
        del factor
        return self.open_image(index)

    def neighbour(self, index: int) -> int:
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
        domains: int64 of shape (N,).
        domain_names: in the order of the domains' numbers.
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
        domains: Tensor | None = None,
        domain_names: tuple[str, ...] | None = None,
    ) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        self.name, self.pixels, self.labels, self.classes, self.licence = name, pixels, labels, classes, licence
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

    def select(self, index: Tensor) -> ArraySource:
        """A copy of the chosen samples."""
        labels = None if self.labels is None else self.labels[index]
        domains = None if self.domains is None else self.domains[index]
        return ArraySource(
            self.name, self._pixels[index], labels, self.classes, self.licence, self.mean, self.std, domains,
            self.domain_names,
        )  # fmt: skip

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
        files: their posix paths relative to it, perhaps with the columns of a manifest.
        channels: 1 for grey, 3 for RGB.
        labels: int64 of shape (N,).
        classes: names, in the order of the labels.
        skipped: files that were left out because they are no images.
        domains: int64 of shape (N,).
        domain_names: in the order of the domains' numbers.
        cache: decoded images to read instead of the files; those that it lacks are decoded.
        bad_files: bears files that can't be decoded; by default 1 %.
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
        *,
        cache: Cache | None = None,
        bad_files: BadFiles | None = None,
    ) -> None:
        self.name, self.root, self.files, self.channels = name, root, Files.of(files), channels
        self.labels, self.classes, self.skipped, self.cache = labels, classes, list(skipped), cache
        self.bad_files = bad_files or BadFiles(parse_limit("1%"), len(self.files))
        self.domains, self.domain_names = domains, domain_names
        self._seen: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def open_image(self, index: int) -> Image.Image:
        """The decoded file, or its image in the cache.

        Raises:
            DecodeError: naming the file.
        """
        return self.open_reduced(index, 1)

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        """The decoded file, a JPEG at 1/factor of its size; or its image in the cache, which is as large as it is.

        Raises:
            DecodeError: naming the file.
        """
        cached = self._cached(index)
        if cached is not None:
            return cached
        path = self.root / self.files[index]
        height, width = self._size(index) if factor > 1 else (0, 0)
        image = decode(path, self.channels, min(height, width) // factor if factor > 1 else None)
        if factor > 1 and image.size not in ((width, height), (-(-width // factor), -(-height // factor))):
            raise DecodeError(path, f"it is not {width}×{height} any more: it has changed since the folder was read")
        return image

    def _cached(self, index: int) -> Image.Image | None:
        place = torch.tensor([index])
        shard = self.files.at("shard", place) if self.cache is not None else None
        if self.cache is None or shard is None or shard < 0:
            return None
        columns = {name: self.files.at(name, place) for name in CACHE_COLUMNS}
        try:
            image = self.cache.read({name: int(column) for name, column in columns.items() if column is not None})
        except CacheError as error:
            _log.warning("%s; the file itself is decoded. `ssl-pipeline prepare --recheck` mends it.", error)
            return None
        mode = "L" if self.channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """From the manifest, or from the files' headers; 1 by 1 where a header can't be read."""
        heights, widths = self.files.at("height", index), self.files.at("width", index)
        if heights is not None and widths is not None:
            return heights.clamp_min(1), widths.clamp_min(1)
        found = torch.tensor([self._size(i) for i in index.tolist()])
        return found[:, 0], found[:, 1]

    def _size(self, index: int) -> tuple[int, int]:
        place = torch.tensor([index])
        height, width = self.files.at("height", place), self.files.at("width", place)
        if height is not None and width is not None:
            return int(height), int(width)
        if index not in self._seen:
            header = check_header(self.root / self.files[index])
            self._seen[index] = (1, 1) if isinstance(header, str) else (header.height, header.width)
        return self._seen[index]

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
        known = self.files.column("bytes")
        sizes = iter(known.tolist()) if known is not None else (self._stored_size(file) for file in self.files)
        for name, size in zip(self.files.encoded(), sizes, strict=True):
            digest.update(b"%b\0%d\0" % (name, size))
        for numbers in (self.labels, self.domains):
            digest.update(b"" if numbers is None else numbers.numpy().tobytes())
        return digest.hexdigest()

    def _stored_size(self, file: str) -> int:
        try:
            return (self.root / file).stat().st_size
        except OSError as error:
            raise ConfigError(
                f"{self.root / file} has gone since the folder was read ({error.strerror}): start again."
            ) from error

    def select(self, index: Tensor) -> FileSource:
        """The chosen files."""
        labels = None if self.labels is None else self.labels[index]
        domains = None if self.domains is None else self.domains[index]
        return FileSource(
            self.name, self.root, self.files.select(index), self.channels, labels, self.classes, self.skipped, domains,
            self.domain_names, cache=self.cache, bad_files=self.bad_files,
        )  # fmt: skip


class SourceConfig(ComponentConfig, ABC):
    """The base of every source's ``Config``."""

    @abstractmethod
    def open(self, split: Split) -> Indexed | None:
        """A split; None where this data has none (``dev`` and ``test`` without labels).

        ``dev`` is held out of the training labels for choices; ``test`` is read by the final evaluation alone.
        """

    def shown_by_views(self, views: Sequence[ViewConfig], hidden: Collection[str]) -> list[str]:
        """Views that show domains which are not to be seen, as sentences that say so; by default none is known to.

        Args:
            views: the policy of every view.
            hidden: the domains' names.
        """
        del views, hidden
        return []
