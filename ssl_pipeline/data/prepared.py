"""What sources of files have in common: the manifest and the cache of decoded images that a look at a folder has left.

A source that takes a folder as it is looks at it (:func:`scan_folder`), and a later start finds what the first has found. One
that is told its files' names (a table) looks them up where somebody has looked already (:func:`lookup_index`); a folder that it may
use a corner of is not read through for it.
"""

from __future__ import annotations

import logging
import posixpath
import shlex
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFiles, BadFilesLimit, Limit, parse_limit
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.cache import Cache, cache_folder, shards_in
from ssl_pipeline.data.file_source import FileDataset
from ssl_pipeline.data.files import FileTable, pack
from ssl_pipeline.data.lost_files import Others, refuse_lost_folders
from ssl_pipeline.data.manifest import Manifest, load, place_of
from ssl_pipeline.data.scan import scan_images
from ssl_pipeline.data.source import DecodedConfig, Opened
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS

_NOT_KNOWN: dict[str, int] = {"bytes": -1, "width": 0, "height": 0, **dict.fromkeys(CACHE_COLUMNS, 0), "shard": -1}
_log = logging.getLogger("ssl_pipeline")


class PreparedConfig(DecodedConfig[Opened], ABC):
    """The keys of a source of files.

    Attributes:
        channels: 3 for RGB, 1 for grayscale.
        bad_files: how many files that can't be read as images are borne, ``20`` or ``1%`` of all: those known at the start
            are left out, one found later is replaced by its neighbor. More stop the run, with a list.
        prepared: where ``ssl-pipeline prepare --output`` was told to write; null is this user's cache.
        cache: read the decoded images that ``ssl-pipeline prepare --cache`` has written, rather than the files.
    """

    channels: Literal[1, 3] = 3
    bad_files: Limit = parse_limit("1%")
    prepared: str | None = None
    cache: bool = False

    @property
    def base(self) -> Path | None:
        """The folder of manifests that is not this user's cache."""
        return Path(self.prepared).expanduser().resolve() if self.prepared else None


@dataclass(frozen=True)
class ImageFiles:
    """Files that are images, as far as is known.

    Attributes:
        root: the folder that their paths start from.
        files: the images; with a manifest's columns where there is one, and :data:`_NOT_KNOWN` where it lacks a file.
        faults: of the files left out, by their full paths, what is wrong with them.
        place: where the manifest of the root is, or would be.
        cache_side: what the cached images' shorter sides are limited to; 0 without a cache.
        folders: what the files' column ``folder`` counts: paths below the root, its own (``.``) first.
        others: the files that are not taken for images.
    """

    root: Path
    files: FileTable
    faults: Mapping[str, str]
    place: Path
    cache_side: int = 0
    folders: tuple[str, ...] = ()
    others: tuple[Others, ...] = ()

    @property
    def relative_faults(self) -> dict[str, str]:
        """The faults by paths below the root."""
        return {file.removeprefix(f"{self.root}/"): fault for file, fault in self.faults.items()}

    def refuse_lost_folders(self, levels: int) -> None:
        """Refuses a class that lost all its files; see :func:`~ssl_pipeline.data.lost_files.refuse_lost_folders`."""
        used = [self.folders[number] for number in _column(self.files, "folder").unique().tolist()]
        refuse_lost_folders(str(self.root), self.folders, used, self.others, self.relative_faults, levels)

    def source(self, config: PreparedConfig[Opened], name: str, **known: Any) -> FileDataset:
        """As a source.

        Args:
            config: the source's.
            name: for messages.
            known: labels, domains and their names, as :class:`~ssl_pipeline.data.file_source.FileDataset` has them.

        Raises:
            ConfigError: the cache is wanted, and there is none.
        """
        bad_files = BadFiles(config.bad_files, len(self.files) + len(self.faults), dict(self.faults))
        skipped = list(self.relative_faults)
        files, cache = self._cached(config) if config.cache else (self.files, None)
        return FileDataset(
            name, self.root, files, config.channels, skipped=skipped, cache=cache, bad_files=bad_files, **known
        )

    def _cached(self, config: PreparedConfig[Opened]) -> tuple[FileTable, Cache]:
        kind = [] if config.name == "folder" else ["--data", config.name]
        place = ["--output", config.prepared] if config.prepared else []
        words = ["ssl-pipeline", "prepare", str(self.root), *kind, "--cache", str(self.cache_side or 256), *place]
        command = shlex.join(words)
        if not self.cache_side:
            raise ConfigError(
                f"`data.cache`: {str(self.root)!r} has no cache of decoded images yet. Make it first, with `{command}`."
            )
        folder = cache_folder(self.place, self.cache_side)
        cache = Cache(folder, self.cache_side)  # from here on nothing in it is deleted
        shards = _column(self.files, "shard")
        there = torch.isin(shards, torch.tensor(list(shards_in(folder)), dtype=shards.dtype))
        kinds = self.files.column("kind")
        shallow = torch.ones_like(there) if kinds is None else kinds == 0  # the cache holds 8 bits
        lacking = int((~there & shallow).sum())
        if lacking:
            _log.warning(
                "%d of %d images in %s are not in its cache, and are decoded anew each time: `%s` adds those below it.",
                lacking, len(self.files), self.root, command,
            )  # fmt: skip
        # Between the look and here a `prepare` may have made the cache anew: one warning, not one for each image.
        return self.files.with_column("shard", torch.where(there, shards, -1)) if lacking else self.files, cache


@lru_cache(maxsize=8)
def scan_folder(root: Path, base: Path | None, limit: BadFilesLimit, depth: int = 0) -> ImageFiles:
    """All images in a folder, looked at once in the process's life and kept for the next.

    Args:
        root: the folder, resolved.
        base: see :attr:`PreparedConfig.base`.
        limit: how many files that are no images are borne.
        depth: files that lie in fewer folders than that below the root are left alone.

    Raises:
        ConfigError: there are more bad files, or a folder can't be listed.
    """
    place = place_of(root, base)
    manifest = scan_images(root, place)
    folders = tuple(manifest.folders)
    files = manifest.files
    if depth:
        deep = torch.tensor([folder != "." and folder.count("/") + 1 >= depth for folder in folders])
        files = files.select(deep[_column(files, "folder").long()].nonzero()[:, 0])
    codes = _column(files, "fault")
    bad = codes.nonzero()[:, 0]
    faults = {str(root / files[i]): manifest.faults[int(codes[i])] for i in bad.tolist()}
    _leave_out(faults, len(files), limit)
    kept = files.select((codes == 0).nonzero()[:, 0]) if faults else files
    if "RGB;16" in manifest.modes:
        cut = int((_column(kept, "mode") == manifest.modes.index("RGB;16")).sum())
        _log.warning("%s: %d images hold colors of 16 bits, of which Pillow reads the upper 8", root, cut)
    return ImageFiles(root, kept, faults, place, manifest.cache_side, folders, manifest.others)


def _column(files: FileTable, name: str) -> Tensor:
    column = files.column(name)
    assert column is not None  # of a manifest
    return column


def _leave_out(faults: Mapping[str, str], count: int, limit: BadFilesLimit) -> None:
    """Tells of files that are left out, or stops if they are too many of so many."""
    BadFiles(limit, count, dict(faults)).stop_if_too_many(len(faults))
    if faults:
        file, fault = next(iter(faults.items()))
        _log.warning("left out %d files of %d that are no images, such as %s: %s", len(faults), count, file, fault)


def lookup_index(root: Path, names: Sequence[str | None], base: Path | None) -> Named:
    """What the manifest of a folder says of some files; where nobody has looked at the folder, nothing.

    A manifest that is there is brought up to date as a folder's own is.

    Args:
        root: the folder, resolved.
        names: paths, absolute or relative to the root; None for a row without one.
        base: see :attr:`PreparedConfig.base`.

    Raises:
        ConfigError: a folder can't be listed, or there is no manifest where one was promised.
    """
    place = place_of(root, base)
    if load(place, root) is None:
        if base is not None:
            raise ConfigError(
                f"`data.prepared`: {str(base)!r} holds no manifest of {str(root)!r}. Make it, with `ssl-pipeline prepare {shlex.quote(str(root))} "
                f"--data table --output {shlex.quote(str(base))}`, or leave the key out."
            )
        return Named(root, names, place, None, torch.full((len(names),), -1))
    manifest = scan_images(root, place)
    row_of = {name: row for row, name in enumerate(manifest.files)}
    rows = [-1 if name is None else row_of.get(plain(name, root), -1) for name in names]
    return Named(root, names, place, manifest, torch.tensor(rows, dtype=torch.int64))


def plain(name: str, root: Path) -> str:
    """The path of a file as a manifest of the root has it; ``..`` stays, because after a link it leads elsewhere than it seems."""
    return name if ".." in name else posixpath.normpath(name.removeprefix(f"{root}/"))


@dataclass(frozen=True)
class Named:
    """Files by name, and their rows in a manifest.

    Attributes:
        root: the folder that relative names start from.
        names: of the files.
        place: where the manifest of the root is, or would be.
        manifest: of the root; None where there is none.
        rows: int64 of shape (N,), −1 for what is not in the manifest.
    """

    root: Path
    names: Sequence[str | None]
    place: Path
    manifest: Manifest | None
    rows: Tensor

    def sound(self) -> list[bool]:
        """Which are known to be images, so that nobody need look whether they are there."""
        return (self._faults() == 0).tolist()

    def _faults(self) -> Tensor:
        """What is wrong with each, by the manifest's numbers; −1 where it is not known."""
        if self.manifest is None:
            return self.rows
        return torch.where(self.rows < 0, -1, _column(self.manifest.files, "fault").long()[self.rows.clamp_min(0)])

    def leave_out_bad(self, there: list[int], limit: BadFilesLimit) -> tuple[list[int], ImageFiles]:
        """Of the files that are there those that are not known to be broken: their places among the names, and the files.

        Raises:
            ConfigError: more are broken than are borne.
        """
        codes = self._faults()[there].tolist()
        kept = [place for place, code in zip(there, codes, strict=True) if code <= 0]
        names = [name for place in kept if (name := self.names[place]) is not None]
        assert len(names) == len(kept)  # without a name no file is there
        if self.manifest is None:
            return kept, ImageFiles(self.root, FileTable.of(names), {}, self.place)
        faults = {
            str(self.root / str(self.names[place])): self.manifest.faults[code]
            for place, code in zip(there, codes, strict=True)
            if code > 0
        }
        _leave_out(faults, len(there), limit)
        rows = self.rows[kept]
        # The range of values is that of all files or, where some are not known, of a few that are looked at.
        known = _NOT_KNOWN | (dict.fromkeys(VALUE_COLUMNS, 0) if bool((rows >= 0).all()) else {})
        columns = {
            name: torch.where(rows < 0, default, _column(self.manifest.files, name)[rows.clamp_min(0)])
            for name, default in known.items()
        }
        return kept, ImageFiles(
            self.root, FileTable(*pack(names), columns), faults, self.place, self.manifest.cache_side
        )
