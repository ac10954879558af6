"""Decoded images on disk: uint8, memory-mapped, in shards, each image with a checksum.

An image's row in the manifest says where it lies (``shard``, ``offset``), its size and channels, and the CRC-32 of its
bytes, which every reading checks. Shards are only ever added to.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from PIL import Image

SHARD_BYTES = 256 * 2**20
COLUMNS = {
    "shard": np.int32, "offset": np.int64, "cached_width": np.int32, "cached_height": np.int32,
    "cached_channels": np.uint8, "crc": np.int64,
}  # fmt: skip


class CacheError(Exception):
    """A cached image that is not what was written."""


def limited(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side at most ``side`` pixels, its shape kept."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (max(1, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.bin"


class CacheWriter:
    """Adds images to a cache, in new shards; used as a context.

    Args:
        folder: of the shards.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._number = max((int(path.stem) for path in folder.glob("[0-9]*.bin")), default=-1)
        self._file = self._next()

    def _next(self) -> BinaryIO:
        self._number += 1
        return _shard(self._folder, self._number).open("wb")

    def add(self, image: Image.Image) -> dict[str, int]:
        """Writes one image of mode ``L`` or ``RGB``.

        Returns:
            Its row's columns.
        """
        if self._file.tell() >= SHARD_BYTES:
            self.flush()
            self._file.close()
            self._file = self._next()
        data = image.tobytes()
        row = {
            "shard": self._number, "offset": self._file.tell(), "cached_width": image.width,
            "cached_height": image.height, "cached_channels": 1 if image.mode == "L" else 3, "crc": zlib.crc32(data),
        }  # fmt: skip
        self._file.write(data)
        return row

    def flush(self) -> None:
        """What was added is on the disk now."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = self._file.tell() == 0
        self.flush()
        self._file.close()
        if empty:
            _shard(self._folder, self._number).unlink()


class Cache:
    """Reads a cache.

    Args:
        folder: of the shards.
        side: what the shorter sides are limited to.
    """

    def __init__(self, folder: Path, side: int) -> None:
        self.folder, self.side = folder, side
        self._shards: dict[int, np.memmap] = {}

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int]]:
        """A worker maps the shards itself: a pickled map would be a copy."""
        return Cache, (self.folder, self.side)

    def read(self, row: Mapping[str, int]) -> Image.Image:
        """The image of a manifest's row.

        Raises:
            CacheError: it is gone, cut off or damaged.
        """
        shape = [row["cached_height"], row["cached_width"], 3][: 2 if row["cached_channels"] == 1 else 3]
        size = int(np.prod(shape))
        try:
            shard = self._shards.get(row["shard"])
            if shard is None:
                shard = self._shards[row["shard"]] = np.memmap(_shard(self.folder, row["shard"]), np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CacheError(f"{_shard(self.folder, row['shard'])} can't be read ({error})") from error
        data = np.asarray(shard[row["offset"] : row["offset"] + size])
        if len(data) != size or zlib.crc32(data.data) != row["crc"]:
            raise CacheError(f"{_shard(self.folder, row['shard'])} is damaged at byte {row['offset']}")
        return Image.fromarray(data.reshape(shape))
