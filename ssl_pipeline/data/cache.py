"""Decoded images on disk: uint8, memory-mapped, in shards, each image with a checksum.

An image's row in the index has its place (``shard``, ``offset``), its size and channels, and the CRC-32 of its bytes, which
every reading checks. A shard is written once: changed images go to new ones. :func:`sweep` deletes those that no row names any
more, while no process reads the cache: readers hold a shared lock on it.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import weakref
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

SHARD_BYTES = 256 * 2**20
LOCK = "in_use.lock"
COLUMNS = {
    "shard": np.int32, "offset": np.int64, "cached_width": np.int32, "cached_height": np.int32,
    "cached_channels": np.uint8, "crc": np.int64,
}  # fmt: skip
_log = logging.getLogger("ssl_pipeline")


class CacheError(Exception):
    """A cached image that is not what was written."""


def limited(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side at most ``side`` pixels, its shape kept."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (max(1, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def cache_folder(place: Path, side: int) -> Path:
    """Where the decoded images lie, beside the index."""
    return place / f"cache-{side}"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.bin"


def shards_in(folder: Path) -> dict[int, Path]:
    """By number the shards that are there."""
    with suppress(OSError):
        found = [path for path in folder.iterdir() if re.fullmatch(r"\d{5,}\.bin", path.name)]
        return {int(path.stem): path for path in found if path.is_file() and not path.is_symlink()}
    return {}


def sweep(place: Path, side: int, used: Collection[int]) -> None:
    """Deletes shards that hold nothing of use, of this cache and of those with other sides, unless somebody reads them.

    No other process may be writing the index in ``place``, whose rows name the ``used`` shards.
    """
    own = cache_folder(place, side)
    others = [path for path in place.glob("cache-*") if re.fullmatch(r"cache-\d+", path.name) and path != own]
    for folder in (own, *others):
        old = [path for number, path in shards_in(folder).items() if folder != own or number not in used]
        if not old:
            continue
        with (folder / LOCK).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # a run reads it, or the file system has no locks
                kept = "%s: %d old shards may be in use and stay; a later `prepare` deletes them."
                _log.warning(kept, folder, len(old))
                continue
            size = sum(path.stat().st_size for path in old)
            for path in old:
                path.unlink()
            _log.info("%s: deleted %d old shards, %.2f GiB", folder, len(old), size / 2**30)
            if folder != own:
                (folder / LOCK).unlink()
                with suppress(OSError):  # somebody else's file lies in it
                    folder.rmdir()


class CacheWriter:
    """Adds images to a cache, in new shards; used as a context."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
        self._folder = folder
        self._number = max(shards_in(folder), default=-1)
        self._file = self._next()

    def _next(self) -> BinaryIO:
        self._number += 1
        return _shard(self._folder, self._number).open("wb")

    def add(self, image: Image.Image) -> dict[str, int]:
        """Writes one image of mode ``L`` or ``RGB``, and gives its row's columns."""
        if self._file.tell() >= SHARD_BYTES:
            self.flush()
            self._file.close()
            self._file = self._next()
        data = image.tobytes()
        channels, start = 1 if image.mode == "L" else 3, self._file.tell()
        self._file.write(data)
        values = self._number, start, image.width, image.height, channels, zlib.crc32(data)
        return dict(zip(COLUMNS, values, strict=True))

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        empty = self._file.tell() == 0
        self.flush()
        self._file.close()
        if empty:
            _shard(self._folder, self._number).unlink()


class Cache:
    """Reads a cache. As long as it lives, also in a forked worker, no shard is deleted; ``shards`` are those that are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[int, np.memmap] = {}
        with suppress(OSError):  # a file system without locks, on which nothing is deleted
            lock = os.open(folder / LOCK, os.O_RDONLY | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_SH)
        self.shards = frozenset(shards_in(folder))

    def __reduce__(self) -> tuple[type[Cache], tuple[Path]]:
        return Cache, (self.folder,)  # a worker maps the shards itself: a pickled map would be a copy

    def read(self, row: Mapping[str, int]) -> Image.Image:
        """The image of an index's row.

        Raises:
            CacheError: it is gone, cut off or damaged.
        """
        shape = [row["cached_height"], row["cached_width"], 3][: 2 if row["cached_channels"] == 1 else 3]
        size, path = math.prod(shape), _shard(self.folder, row["shard"])
        try:
            if row["shard"] not in self._maps:
                self._maps[row["shard"]] = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} can't be read ({error})") from error
        data = np.asarray(self._maps[row["shard"]][row["offset"] : row["offset"] + size])
        if len(data) != size or zlib.crc32(data.data) != row["crc"]:
            raise CacheError(f"{path} is damaged at byte {row['offset']}")
        return Image.fromarray(data.reshape(shape))
