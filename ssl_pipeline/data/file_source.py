"""Image files as numbered samples: decoded when they are wanted, or read from the cache of decoded images."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.cache import Cache, CacheError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError, check_header, decode
from ssl_pipeline.data.files import FileTable
from ssl_pipeline.data.value_range import measured

_log = logging.getLogger("ssl_pipeline")


class FileDataset(IndexedDataset):
    """Image files of any sizes, decoded when they are wanted.

    Args:
        name: for messages.
        root: the folder that all files are in or below.
        files: their posix paths relative to it, perhaps with the columns of a manifest.
        channels: 1 for grayscale, 3 for RGB.
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
        self.name, self.root, self.files, self.channels = name, root, FileTable.of(files), channels
        self.labels, self.classes, self.skipped, self.cache = labels, classes, list(skipped), cache
        self.bad_files = bad_files or BadFiles(parse_limit("1%"), len(self.files))
        self.domains, self.domain_names = domains, domain_names
        self._every = self.files
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
        image = decode(path, self.channels, min(height, width) // factor if factor > 1 else None, self.value_range)
        if factor > 1 and image.size not in ((width, height), (-(-width // factor), -(-height // factor))):
            raise DecodeError(path, f"it is not {width}×{height} any more: it has changed since the folder was read")
        return image

    def stored_values(self) -> FileTable:
        """Of all files that these were chosen from: by their manifest or, where some are not known, of a few that are looked at."""
        every = self._every
        known = every.column("kind") is not None
        return every if known else measured(lambda i: Image.open(self.root / every[i]), len(every), self.name)

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
        if heights is not None and widths is not None and bool((heights > 0).all()):
            return heights, widths
        found = torch.tensor([self._size(i) for i in index.tolist()])
        return found[:, 0], found[:, 1]

    def _size(self, index: int) -> tuple[int, int]:
        place = torch.tensor([index])
        height, width = self.files.at("height", place), self.files.at("width", place)
        if height is not None and width is not None and height > 0:
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
        sizes = [-1] * len(self.files) if known is None else known.tolist()
        for name, size in zip(self.files.encoded(), sizes, strict=True):
            digest.update(b"%b\0%d\0" % (name, self._stored_size(os.fsdecode(name)) if size < 0 else size))
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

    def select(self, index: Tensor) -> Self:
        """The chosen files."""
        chosen = super().select(index)
        chosen.files, chosen._seen = self.files.select(index), {}
        return chosen
