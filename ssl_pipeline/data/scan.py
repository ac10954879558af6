"""One look at a folder: what files are in it, and which of them are images. In parallel, resumed where it was stopped."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_pipeline.data import manifest as stored
from ssl_pipeline.data.cache import CacheWriter, cache_folder, limited, shards_in, sweep
from ssl_pipeline.data.decode import GRAYSCALE_MODES, DecodeError, Header, check_header, decode_bytes, explain
from ssl_pipeline.data.files import FileTable, pack
from ssl_pipeline.data.lost_files import Others
from ssl_pipeline.data.manifest import HEADER, PIXELS, RACY_NS, TRAITS, UNCHECKED, Manifest
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS
from ssl_pipeline.data.walk import ENDINGS, ending_of, images_without_ending, walk
from ssl_pipeline.logging.progress import console

_CHUNK, _SECONDS_BETWEEN_SAVES = 512, 30.0
_MANY = 5_000  # files that take some seconds to look at: said before, where no bar shows it
_CHANGED = "its bytes have changed while its size and time have not: it is damaged (restore it), or changed on purpose"
_log = logging.getLogger("ssl_pipeline")


@dataclass(frozen=True)
class Wanted:
    """What a look is to find out.

    Attributes:
        pixels: decode every file and take its digest, rather than read its header.
        cache_side: also write the decoded images, their shorter sides limited to so many pixels; 0 for none.
        recheck: read every file anew, the unchanged ones too.
    """

    pixels: bool = False
    cache_side: int = 0
    recheck: bool = False


@dataclass
class _Listing:
    """A manifest in the making: what :class:`~ssl_pipeline.data.manifest.Manifest` has, to be written to."""

    root: Path
    names: list[str]
    rows: np.ndarray
    folders: list[str]
    folder_mtimes: list[int]
    others: tuple[Others, ...]
    began: int
    faults: dict[str, int] = field(default_factory=lambda: {"": 0})
    modes: dict[str, int] = field(default_factory=lambda: {"": 0})
    cache_side: int = 0

    def manifest(self) -> Manifest:
        """As it stands."""
        columns = {name: torch.from_numpy(self.rows[name].copy()) for name in stored.COLUMNS}
        return Manifest(
            self.root, FileTable(*pack(self.names), columns), FileTable.of(self.folders),
            torch.tensor(self.folder_mtimes, dtype=torch.int64), tuple(self.faults), tuple(self.modes), self.others,
            self.began, bool((self.rows["checked"] > UNCHECKED).all()), self.cache_side,
        )  # fmt: skip


def scan_images(root: Path, place: Path, wanted: Wanted | None = None) -> Manifest:
    """The manifest of a folder, made anew only where the folder has changed or more is wanted than is known.

    Args:
        root: the folder, resolved. Nothing in it is changed.
        place: where its manifest is kept; if nothing can be written there, it is made for this process alone.
        wanted: None takes a manifest that is there as it is, if the folder has not changed.

    Raises:
        ConfigError: a folder can't be listed.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        _log.info("%s can't be written: every start reads the headers of all files in %s.", place, root)
    with stored.locked(place) if writable else nullcontext(False) as alone:
        old = stored.load(place, root)
        if wanted is None and old is not None and old.whole and old.is_fresh():
            return old
        listing = _list(root)
        if old is not None:
            _reuse(listing, old)
        _check(listing, place if writable else None, wanted or Wanted())
        if wanted is not None and alone:
            sweep(place, listing.cache_side, np.unique(listing.rows["shard"]).tolist())
        return (stored.load(place, root) if writable else None) or listing.manifest()


def _list(root: Path) -> _Listing:
    """All files, none of them checked."""
    began = time.time_ns()
    folders, mtimes, found = list[str](), list[int](), list[tuple[str, int, int, int]]()
    others, unnamed = dict[tuple[str, str], list[str]](), list[tuple[str, int, int, int]]()
    for number, (folder, mtime, files) in enumerate(walk(root)):
        folders.append(folder)
        mtimes.append(mtime)
        for name, size, changed in files:
            file, ending = (name if folder == "." else f"{folder}/{name}", size, changed, number), ending_of(name)
            if ending in ENDINGS:
                found.append(file)
            elif not ending:
                unnamed.append(file)
            else:
                others.setdefault((folder, ending), []).append(file[0])
    for file, is_image in zip(unnamed, images_without_ending(root / file[0] for file in unnamed), strict=True):
        if is_image:
            found.append(file)
        else:
            others.setdefault((folders[file[3]], ""), []).append(file[0])
    found.sort()
    rows = stored.new_rows(len(found))
    for place, name in enumerate(("bytes", "mtime", "folder"), 1):
        rows[name] = [entry[place] for entry in found]
    told = tuple(Others(*where, len(names), min(names)) for where, names in others.items())
    return _Listing(root, [entry[0] for entry in found], rows, folders, mtimes, told, began)


def _reuse(listing: _Listing, old: Manifest) -> None:
    """Takes over what is known of files whose name, size and time have not changed."""
    row_of = {name: row for row, name in enumerate(old.files)}
    match = np.array([row_of.get(name, -1) for name in listing.names], np.int64)
    kept = (match >= 0).nonzero()[0]
    before, now = old.rows()[match[kept]], listing.rows[kept]
    same = (before["bytes"] == now["bytes"]) & (before["mtime"] == now["mtime"])
    same &= before["mtime"] < old.began - RACY_NS  # a later change might have the same time
    before["folder"] = now["folder"]
    listing.rows[kept[same]] = before[same]
    listing.faults, listing.modes = (
        {text: code for code, text in enumerate(table)} for table in (old.faults, old.modes)
    )
    listing.cache_side = old.cache_side


def _check(listing: _Listing, place: Path | None, wanted: Wanted) -> None:
    """Checks what is not yet known as well as is wanted, and saves it now and then."""
    rows = listing.rows
    if wanted.cache_side and wanted.cache_side != listing.cache_side:
        rows["shard"], listing.cache_side = -1, wanted.cache_side
    if wanted.cache_side and place is not None:
        there = list(shards_in(cache_folder(place, wanted.cache_side)))
        rows["shard"][~np.isin(rows["shard"], there)] = -1  # somebody has deleted it
    level = PIXELS if wanted.pixels or wanted.cache_side else HEADER
    due = (rows["checked"] < level) | wanted.recheck
    if wanted.cache_side:
        due |= (rows["shard"] < 0) & (rows["fault"] == 0) & (rows["kind"] == 0)
    places = due.nonzero()[0].tolist()
    if len(places) >= _MANY and not console().is_terminal and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(
            f"looking at {len(places):,} files of {listing.root}; what is found is kept for the next time\n"
        )
    began = saved = time.monotonic()
    with ExitStack() as stack:
        if place is not None:
            stack.callback(lambda: stored.save(listing.manifest(), place))  # also of a look that is interrupted
        writer = None
        if wanted.cache_side and place is not None and places:
            writer = stack.enter_context(CacheWriter(cache_folder(place, wanted.cache_side)))
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)) if level == PIXELS else 16))
        bar = stack.enter_context(counting_bar())
        row = bar.add_task(f"looking at {listing.root.name}", total=len(places))
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            paths = [listing.root / listing.names[i] for i in chunk]
            for i, found in zip(
                chunk, pool.map(lambda path: _find(path, level, wanted.cache_side), paths), strict=True
            ):
                _enter(listing, i, found, level, writer)
                bar.advance(row)
            if place is not None and time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                if writer is not None:
                    writer.flush()
                stored.save(listing.manifest(), place)
                saved = time.monotonic()
    if places:
        _log.info("looked at %d files of %s in %.1f s", len(places), listing.root, time.monotonic() - began)


def counting_bar() -> Progress:
    """Of a look; only the main process of a terminal's shows it."""
    quiet = not console().is_terminal or os.environ.get("RANK", "0") != "0"
    columns = TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn()
    return Progress(*columns, console=console(), disable=quiet, transient=True)


@dataclass(frozen=True)
class _Found:
    header: Header | None
    fault: str = ""
    digest: int = 0
    image: Image.Image | None = None


def _find(path: Path, level: int, cache_side: int) -> _Found:
    header = check_header(path)
    if isinstance(header, str) or level < PIXELS:
        return _Found(None, header) if isinstance(header, str) else _Found(header)
    try:
        data = path.read_bytes()
    except OSError as error:
        return _Found(header, explain(path, error))
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
    channels = 1 if header.mode.split(";")[0] in GRAYSCALE_MODES else 3
    try:
        # Without a cache a JPEG is decoded at an eighth of its size, which reads it to its end in a third of the time.
        image = decode_bytes(data, path, channels, cache_side or 1)
    except DecodeError as error:
        return _Found(header, error.fault, digest)
    keeps = cache_side and not header.values.kind  # the cache holds 8 bits
    return _Found(header, "", digest, limited(image, cache_side) if keeps else None)


def _enter(listing: _Listing, place: int, found: _Found, level: int, writer: CacheWriter | None) -> None:
    row = listing.rows[place]
    if found.header is not None:
        row["width"], row["height"] = found.header.width, found.header.height
        for name in VALUE_COLUMNS:
            row[name] = getattr(found.header.values, name)
        row["mode"] = listing.modes.setdefault(found.header.mode, len(listing.modes))
        row["traits"] = sum(1 << bit for bit, name in enumerate(TRAITS) if name in found.header.traits)
    changed = row["digest"] and found.digest and row["digest"] != found.digest
    row["fault"] = listing.faults.setdefault(found.fault or (_CHANGED if changed else ""), len(listing.faults))
    row["checked"] = level
    if not changed:  # otherwise it is told again until the file is restored, or has another time
        row["digest"] = found.digest
    if writer is not None and found.image is not None:
        for name, value in writer.add(found.image).items():
            row[name] = value
