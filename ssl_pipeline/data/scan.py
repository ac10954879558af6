"""From a folder to its index: lists the images and checks their headers or pixels.

Training, prediction and embedding all list a folder by this. Hidden files and folders (``.git``, ``._photo.jpg``) are skipped, links
are followed, and a folder is a folder whatever its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.cache import CacheWriter, cache_folder, limited, shards_in, sweep
from ssl_pipeline.data.decode import DecodeError, check_header, decode, decode_errors, is_grayscale
from ssl_pipeline.data.image_index import COLUMNS, HEADER, PIXELS, RACY_NS, TRAITS, FileTable, IgnoredFiles, ImageIndex
from ssl_pipeline.logging.progress import console

# Formats that Pillow names without reading them itself: other programs would have to, one of which runs what the file says.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_CHUNK, _SECONDS_BETWEEN_SAVES = 512, 30.0
_MANY = 5_000  # files that take some seconds to check: announced where no bar shows it
_CHANGED = "its bytes have changed while its size and time have not: it is damaged (restore it), or changed on purpose"
_log = logging.getLogger("ssl_pipeline")

Image.init()
ENDINGS = {
    ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _NOT_READ
} | {".mpo"}  # in lower case: all that Pillow reads


def images_in(root: Path) -> list[Path]:
    """All images in and below a folder, by their paths.

    Raises:
        ConfigError: a folder can't be listed.
    """
    return sorted(root / name for name in list_folder(root).files)


def index_images(
    root: Path, place: Path, cache_side: int = 0, *, pixels: bool = False, recheck: bool = False, reuse: bool = True
) -> ImageIndex:
    """The index of a folder, made anew only where the folder has changed or more is asked than is known.

    Args:
        root: the folder, resolved. Nothing in it is changed.
        place: where its index is kept; if nothing can be written there, it is made for this process alone.
        cache_side: also write the decoded images, their shorter sides limited to so many pixels; 0 for none.
        pixels: decode every file and take its digest, rather than read its header.
        recheck: read every file anew, the unchanged ones too.
        reuse: take an index that is there, if the folder has not changed.

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
    with _locked(place) if writable else nullcontext(False) as alone:
        old = ImageIndex.load(place, root)
        reuse = reuse and not (cache_side or pixels or recheck)
        if reuse and old is not None and old.whole and old.is_fresh():
            return old
        index = list_folder(root)
        if old is not None:
            _reuse(index, old)
        _check(index, place if writable else None, cache_side, PIXELS if pixels or cache_side else HEADER, recheck)
        if alone and not reuse:
            sweep(place, index.cache_side, np.unique(index.columns["shard"]).tolist())
        return (ImageIndex.load(place, root) if writable else None) or index


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """One process at a time checks a folder; the others wait, and find its index.

    Yields:
        Whether that is certain: some network file systems have no locks, and there two checks at once are waste, not harm.
    """
    with (place / "lock").open("w") as file:
        alone = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        yield alone


def list_folder(root: Path) -> ImageIndex:
    """All files in and below a folder, none of them checked.

    Raises:
        ConfigError: a folder can't be listed.
    """
    began, mtimes = time.time_ns(), dict[str, int]()
    found, unnamed = list[tuple[str, int, int, int]](), list[tuple[str, int, int, int]]()  # as the columns, see below
    ignored = dict[tuple[str, str], list[str]]()
    for number, (folder, mtime, files) in enumerate(_walk(root)):
        mtimes[folder] = mtime
        for name, size, changed in files:
            path = name if folder == "." else f"{folder}/{name}"
            ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million names
            if ending in ENDINGS or not ending:
                (found if ending else unnamed).append((path, size, changed, number))
            else:
                ignored.setdefault((folder, ending), []).append(path)
    folders = list(mtimes)
    with ThreadPoolExecutor(16) as pool:
        are_images = pool.map(_has_image_content, [root / file[0] for file in unnamed])
        for file, is_image in zip(unnamed, are_images, strict=True):
            if is_image:
                found.append(file)
            else:
                ignored.setdefault((folders[file[3]], ""), []).append(file[0])
    found.sort()
    columns = FileTable.of([file[0] for file in found]).columns
    for place, name in enumerate(("bytes", "mtime", "folder"), 1):
        columns[name] = np.array([file[place] for file in found], COLUMNS[name])
    others = [IgnoredFiles(*where, len(names), min(names)) for where, names in ignored.items()]
    return ImageIndex(root, columns, folders, list(mtimes.values()), others, began)


def _walk(root: Path) -> Iterator[tuple[str, int, list[tuple[str, int, int]]]]:
    """Per folder its path, mtime, and visible files with their sizes and mtimes.

    Each real folder is visited once, so that a loop of links ends; of two links to one folder the same is taken on every
    machine, because folders are visited in the order of their names.
    """
    seen, pending = {root.resolve()}, [root]
    while pending:
        folder = pending.pop()
        try:
            mtime = folder.stat().st_mtime_ns
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(
                f"{str(folder)!r} can't be listed ({error.strerror}): make it readable or take it out."
            ) from error
        below, files = [], []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            is_folder, size, changed = False, 0, 0
            with suppress(OSError):  # a link to itself or to nowhere: the check of headers reports it
                stat = entry.stat()
                is_folder, size, changed = entry.is_dir(), stat.st_size, stat.st_mtime_ns
            if not is_folder:
                files.append((entry.name, size, changed))
            elif (real := Path(entry.path).resolve()) not in seen:
                seen.add(real)
                below.append(Path(entry.path))
        yield folder.relative_to(root).as_posix(), mtime, files
        pending += reversed(below)


def _has_image_content(path: Path) -> bool:
    """Whether the content of a file is an image's, for files whose name does not say."""
    with suppress(DecodeError), decode_errors(path):
        if path.is_file():
            with Image.open(path) as file:
                return file.format not in _NOT_READ
    return False


def _reuse(index: ImageIndex, old: ImageIndex) -> None:
    """Takes over what is known of files whose name, size and time have not changed."""
    new, before = index.columns, old.columns
    _, here, there = np.intersect1d(new["name"], before["name"], assume_unique=True, return_indices=True)
    same = (new["bytes"][here] == before["bytes"][there]) & (new["mtime"][here] == before["mtime"][there])
    same &= before["mtime"][there] < old.began - RACY_NS
    for name in COLUMNS.keys() - {"folder"}:
        new[name][here[same]] = before[name][there[same]]
    index.faults, index.modes, index.cache_side = dict(old.faults), dict(old.modes), old.cache_side


def _check(index: ImageIndex, place: Path | None, side: int, level: int, recheck: bool) -> None:
    """Checks what is not yet known as well as is asked, and saves it now and then."""
    columns = index.columns
    if side and side != index.cache_side:
        columns["shard"][:], index.cache_side = -1, side
    if side and place is not None:
        columns["shard"][~np.isin(columns["shard"], list(shards_in(cache_folder(place, side))))] = -1  # were deleted
    due = (columns["checked"] < level) | recheck
    if side:
        due |= (columns["shard"] < 0) & (columns["fault"] == 0) & (columns["kind"] == 0)
    rows, files = due.nonzero()[0].tolist(), index.files
    if len(rows) >= _MANY and not console().is_terminal and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"checking {len(rows):,} files of {index.root}; the results are kept for the next time\n")
    began = saved = time.monotonic()
    with ExitStack() as stack:
        if place is not None:
            stack.callback(lambda: index.save(place))  # also when it is interrupted
        writer = None
        if side and place is not None and rows:
            writer = stack.enter_context(CacheWriter(cache_folder(place, side)))
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)) if level == PIXELS else 16))
        bar = stack.enter_context(counting_bar())
        task = bar.add_task(f"checking {index.root.name}", total=len(rows))
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            found = pool.map(lambda row: _check_file(index.root / files[row], level, side), chunk)
            for row, (known, image) in zip(chunk, found, strict=True):
                if writer is not None and image is not None:
                    known |= writer.add(image)
                _enter(index, row, known)
                bar.advance(task)
            if place is not None and time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                if writer is not None:
                    writer.flush()
                index.save(place)
                saved = time.monotonic()
    if rows:
        _log.info("checked %d files of %s in %.1f s", len(rows), index.root, time.monotonic() - began)


def counting_bar() -> Progress:
    """The progress of a check; only the main process shows it, in a terminal."""
    quiet = not console().is_terminal or os.environ.get("RANK", "0") != "0"
    columns = TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn()
    return Progress(*columns, console=console(), disable=quiet, transient=True)


def _check_file(path: Path, level: int, cache_side: int) -> tuple[dict[str, Any], Image.Image | None]:
    """What a file's columns get, its fault and mode still in words; and its image for the cache."""
    known: dict[str, Any] = {"checked": level, "fault": "", "digest": 0}
    try:
        header = check_header(path)
        traits = sum(1 << bit for bit, name in enumerate(TRAITS) if name in header.traits)
        known |= {
            "width": header.width,
            "height": header.height,
            "mode": header.mode,
            "traits": traits,
            **header.values,
        }
        if level == PIXELS:
            with decode_errors(path):
                data = path.read_bytes()
            known["digest"] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
            # Without a cache a JPEG is decoded at an eighth of its size, which reads it to its end in a third of the time.
            image = decode(path, 1 if is_grayscale(header.mode) else 3, cache_side or 1, (0.0, 1.0), data)
            if cache_side and not header.values["kind"]:  # the cache holds 8 bits
                return known, limited(image, cache_side)
    except DecodeError as error:
        known["fault"] = error.fault
    return known, None


def _enter(index: ImageIndex, row: int, known: dict[str, Any]) -> None:
    before = int(index.columns["digest"][row])
    if before and known["digest"] not in (0, before):
        known["fault"] = known["fault"] or _CHANGED
        del known["digest"]  # so that it is reported again until the file is restored, or has another time
    for name, words in (("fault", index.faults), ("mode", index.modes)):
        if name in known:
            known[name] = words.setdefault(known[name], len(words))
    for name, value in known.items():
        index.columns[name][row] = value
