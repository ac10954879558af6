"""Image files as numbered samples: decoded when they are needed, or read from the cache of decoded images.

A source that takes a whole folder indexes it (:func:`scan_folder`), and a later start finds that index. One that gets file names
(a table) uses an index that is there (:func:`lookup_files`), and makes none: it may need a corner of the folder only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import shlex
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import BadFiles, BadFilesLimit, Limit, parse_limit, warn_once
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.cache import Cache, CacheError, cache_folder
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError, as_8_bit, decode, upright_size
from ssl_pipeline.data.image_index import UNCHECKED, FileTable, ImageIndex, causes, first_levels, index_folder
from ssl_pipeline.data.scan import index_images
from ssl_pipeline.data.source import HoldOutConfig
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS
from ssl_pipeline.data.value_range import measured

_BESIDE_IMAGES = {
    ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini", ".html", ".htm", ".url",
    ".pdf", ".db", ".log", ".py", ".ipynb",
}  # fmt: skip
_log = logging.getLogger("ssl_pipeline")


class FileDataset(IndexedDataset):
    """Image files of any sizes, decoded when they are needed.

    Args:
        name: for messages.
        root: the folder that all files are in or below.
        files: their posix paths relative to it, perhaps with what an index knows of them.
        channels: 1 for grayscale, 3 for RGB.
        labels: see :class:`IndexedDataset`, also for ``classes`` and the domains.
        cache: decoded images to read instead of the files; those that it lacks are decoded.
        bad_files: counts files that can't be decoded; by default 1 % are allowed.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: FileTable | Sequence[str],
        channels: int,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
        *,
        domains: Tensor | None = None,
        domain_names: tuple[str, ...] | None = None,
        cache: Cache | None = None,
        bad_files: BadFiles | None = None,
    ) -> None:
        self.name, self.root, self.files, self.channels = name, root, FileTable.of(files), channels
        self.labels, self.classes, self.cache = labels, classes, cache
        self.bad_files = bad_files or BadFiles(parse_limit("1%"), len(self.files))
        self.domains, self.domain_names = domains, domain_names
        self._every = self.files
        self._seen: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def open_image(self, index: int) -> Image.Image:
        return self.open_reduced(index, 1)

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        """The decoded file, a JPEG at 1/factor of its size; or its image in the cache, whatever its size."""
        cached = self._cached(index)
        if cached is not None:
            return cached
        path = self.root / self.files[index]
        height, width = self._size(index) if factor > 1 else (0, 0)
        image = decode(path, self.channels, min(height, width) // factor if factor > 1 else None, self.value_range)
        if factor > 1 and image.size not in ((width, height), (-(-width // factor), -(-height // factor))):
            raise DecodeError(path, f"it is not {width}×{height} any more: it has changed since the folder was read")
        return image

    def _cached(self, index: int) -> Image.Image | None:
        if self.cache is None:
            return None
        row = self.files.row(index, tuple(CACHE_COLUMNS))
        if row["shard"] not in self.cache.shards:
            return None
        try:
            image = self.cache.read(row)
        except CacheError as error:
            _log.warning("%s; the file itself is decoded. `ssl-pipeline prepare --recheck` mends it.", error)
            return None
        return as_8_bit(image, "L" if self.channels == 1 else "RGB")

    def stored_values(self) -> Mapping[str, np.ndarray]:
        """Of all files that these were chosen from: by their index or, where it lacks some, of a few that are read."""
        every = self._every
        if bool((every.column("checked") > UNCHECKED).all()):
            return {name: every.column(name) for name in VALUE_COLUMNS}
        return measured(lambda i: Image.open(self.root / every[i]), len(every), self.name)

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """From the index of the folder, or from the files' headers; 1 by 1 where a header can't be read."""
        heights, widths = self.files.column("height", index), self.files.column("width", index)
        if heights.all():
            return torch.from_numpy(heights).long(), torch.from_numpy(widths).long()
        found = torch.tensor([self._size(i) for i in index.tolist()])
        return found[:, 0], found[:, 1]

    def _size(self, index: int) -> tuple[int, int]:
        known = self.files.row(index, ("height", "width"))
        if known["height"]:
            return known["height"], known["width"]
        if index not in self._seen:
            self._seen[index] = 1, 1
            with suppress(DecodeError):  # decoding raises it again
                self._seen[index] = upright_size(self.root / self.files[index])
        return self._seen[index]

    def describe(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        """Of relative paths, sizes and labels; contents are not read.

        Times and the root do not count, so that a copy on another disk is the same data to a resumed run.

        Raises:
            ConfigError: a file has gone since the folder was read.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, size in zip(self.files.column("name").tolist(), self.files.column("bytes").tolist(), strict=True):
            path = self.root / os.fsdecode(name)
            try:
                digest.update(b"%b\0%d\0" % (name, path.stat().st_size if size < 0 else size))
            except OSError as error:
                raise ConfigError(
                    f"{path} has gone since the folder was read ({error.strerror}): start again."
                ) from error
        return self.finish_fingerprint(digest)

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen.files, chosen._seen = self.files.select(index), {}
        return chosen


class PreparedConfig(HoldOutConfig, ABC):
    """The keys of a source of files.

    Attributes:
        channels: 3 for RGB, 1 for grayscale.
        max_bad_files: how many files that can't be read as images are allowed, ``20`` or ``1%`` of all: those known at the start
            are left out, one found later is replaced by its neighbor. More stop the run, with a list.
        prepared: the folder that was given to ``ssl-pipeline prepare --output``; null is this user's cache.
        cache: read the decoded images that ``ssl-pipeline prepare --cache`` has written, rather than the files.
    """

    channels: Literal[1, 3] = 3
    max_bad_files: Limit = parse_limit("1%")
    prepared: str | None = None
    cache: bool = False

    @property
    def base(self) -> Path | None:
        """Where indexes are kept; None for this user's cache."""
        return Path(self.prepared).expanduser().resolve() if self.prepared else None


@dataclass(frozen=True)
class ImageFiles:
    """Images below a root, by paths that start from it.

    Attributes:
        place: where the index of the root is, or would be.
        index: None where there is none.
        faults: of the files left out, by their paths, what is wrong with them.
    """

    root: Path
    files: FileTable
    place: Path
    index: ImageIndex | None = None
    faults: Mapping[str, str] = field(default_factory=dict)

    def without_bad(self, limit: BadFilesLimit) -> ImageFiles:
        """Leaves out the files that the index knows to be broken.

        Raises:
            ConfigError: more are broken than are allowed.
        """
        faults = {} if self.index is None else self.index.faults_of(self.files)
        self._bad_files(limit, len(self.files), faults).stop_if_too_many()
        if faults:
            file, fault = next(iter(faults.items()))
            _log.warning(
                "left out %d files of %d that are no images, such as %s: %s",
                len(faults), len(self.files), self.root / file, fault,
            )  # fmt: skip
        return replace(self, files=self.files.select(self.files.column("fault") == 0), faults=faults)

    def _bad_files(self, limit: BadFilesLimit, count: int, faults: Mapping[str, str]) -> BadFiles:
        return BadFiles(limit, count, {str(self.root / file): fault for file, fault in faults.items()})

    def by_folder(self, name: Callable[[str], str] = str) -> tuple[tuple[str, ...], Tensor]:
        """The sorted names that the files' folders (paths below the root) stand for, and per file the number of its name."""
        assert self.index is not None
        used, of_file = np.unique(self.files.column("folder"), return_inverse=True)
        found = [name(self.index.folders[number]) for number in used.tolist()]
        names = tuple(sorted(set(found)))
        return names, torch.tensor([names.index(one) for one in found], dtype=torch.int64)[torch.from_numpy(of_file)]

    def refuse_lost_folders(self, levels: int) -> None:
        """Refuses a folder in which a class, so many levels deep, lost all its files: it would vanish without a word.

        Folders that hold nothing but texts and tables are no classes; empty ones are logged.
        """
        assert self.index is not None

        def top(folder: str) -> str:
            return first_levels(folder, levels)

        kept = set(self.by_folder(top)[0])
        problems, empty = [], []
        for name in sorted({top(folder) for folder in self.index.folders} - kept - {""}):
            ours = [one for one in self.index.ignored if top(one.folder) == name]
            bad = {file: fault for file, fault in self.faults.items() if top(file.rpartition("/")[0]) == name}
            if bad or any(one.ending not in _BESIDE_IMAGES for one in ours):
                problems.append(
                    f"{str(self.root)!r}: none of the files in {name!r} is an image: {'; '.join(causes(ours, bad))}. Convert or "
                    "replace them, or move the folder out."
                )
            elif not ours:
                empty.append(name)
        if problems:
            raise ConfigError(problems)
        if empty and kept - {""}:
            warn_once(f"{self.root}: {joined(empty)} hold no image and are no classes.")

    def dataset(self, config: PreparedConfig, name: str, **known: Any) -> FileDataset:
        """The files as a dataset, with ``known`` labels, domains and their names.

        Raises:
            ConfigError: the cache is asked for, and there is none.
        """
        bad_files = self._bad_files(config.max_bad_files, len(self.files) + len(self.faults), self.faults)
        cache = self._cache(config) if config.cache else None
        return FileDataset(name, self.root, self.files, config.channels, cache=cache, bad_files=bad_files, **known)

    def _cache(self, config: PreparedConfig) -> Cache:
        side = 0 if self.index is None else self.index.cache_side
        kind = [] if config.name == "folder" else ["--data", config.name]
        place = ["--output", config.prepared] if config.prepared else []
        command = shlex.join(["ssl-pipeline", "prepare", str(self.root), *kind, "--cache", str(side or 256), *place])
        if not side:
            raise ConfigError(
                f"`data.cache`: {str(self.root)!r} has no cache of decoded images yet. Make it first, with `{command}`."
            )
        cache = Cache(cache_folder(self.place, side))  # from here on nothing in it is deleted
        there = np.isin(self.files.column("shard"), list(cache.shards))
        lacking = int((~there & (self.files.column("kind") == 0)).sum())  # the cache holds 8 bits
        if lacking:
            _log.warning(
                "%d of %d images in %s are not in its cache, and are decoded anew each time: `%s` adds those below it.",
                lacking, len(self.files), self.root, command,
            )  # fmt: skip
        return cache


@lru_cache(maxsize=8)
def scan_folder(root: Path, base: Path | None, limit: BadFilesLimit, depth: int = 0) -> ImageFiles:
    """All images in a folder, read once in the process's life; its index is kept for the next one.

    Args:
        root: resolved.
        base: see :attr:`PreparedConfig.base`.
        limit: how many files that are no images are allowed.
        depth: files that lie in fewer folders below the root are left out.

    Raises:
        ConfigError: there are more bad files, or a folder can't be listed.
    """
    place = index_folder(root, base)
    index = index_images(root, place)
    files = index.files
    if depth:
        deep = np.array([folder != "." and folder.count("/") + 1 >= depth for folder in index.folders])
        files = files.select(deep[files.column("folder")])
    images = ImageFiles(root, files, place, index).without_bad(limit)
    cut = int((images.files.column("mode") == index.modes.get("RGB;16", -1)).sum())
    if cut:
        _log.warning("%s: %d images hold colors of 16 bits, of which Pillow reads the upper 8", root, cut)
    return images


def lookup_files(root: Path, names: Sequence[str | None], base: Path | None) -> ImageFiles:
    """Files by name, with what the index of their folder knows; an index that is there is brought up to date.

    Args:
        root: resolved.
        names: paths, absolute or relative to the root; None for a row without one.
        base: see :attr:`PreparedConfig.base`.

    Raises:
        ConfigError: a folder can't be listed, or there is no index in ``base``.
    """
    place = index_folder(root, base)
    files = FileTable.of([name or "" for name in names])
    if ImageIndex.load(place, root) is None:
        if base is not None:
            raise ConfigError(
                f"`data.prepared`: {str(base)!r} holds no index of {str(root)!r}. Make it, with `ssl-pipeline prepare "
                f"{shlex.quote(str(root))} --data table --output {shlex.quote(str(base))}`, or leave the key out."
            )
        return ImageFiles(root, files, place)
    index = index_images(root, place)
    row_of = {name: row for row, name in enumerate(index.files)}
    rows = np.array([-1 if name is None else row_of.get(normal_path(name, root), -1) for name in names], np.int64)
    known = rows >= 0
    for name, column in files.columns.items():
        if name != "name":
            column[known] = index.columns[name][rows[known]]
    return ImageFiles(root, files, place, index)


def normal_path(name: str, root: Path) -> str:
    """The path of a file as an index of the root has it; ``..`` stays, because after a link it may lead elsewhere."""
    return name if ".." in name else posixpath.normpath(name.removeprefix(f"{root}/"))
