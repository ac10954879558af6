"""The index of a folder of images: which files are images, and what their headers and bytes say.

An index lies outside its folder: in this user's cache (``$SSL_PIPELINE_CACHE``, otherwise ``$XDG_CACHE_HOME/ssl_pipeline`` or
``~/.cache/ssl_pipeline``), or where ``ssl-pipeline prepare --output`` puts it. It is one safetensors file, which processes map
and share. It holds as long as no folder's modification time has changed, so no file was added, removed or renamed; a file that
was overwritten in place is only seen by ``ssl-pipeline prepare``, or by its size when it is decoded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ssl_pipeline.config.files import atomic_write
from ssl_pipeline.data.bad_files import IgnoredFiles
from ssl_pipeline.data.cache import CacheWriter, cache_folder, limited, shards_in, sweep
from ssl_pipeline.data.decode import DecodeError, Header, check_header, decode_bytes, explain, is_grayscale
from ssl_pipeline.data.file_table import COLUMNS, HEADER, PIXELS, TRAITS, UNCHECKED, FileTable
from ssl_pipeline.data.walk import list_images
from ssl_pipeline.logging.progress import console

FILE_NAME = "index.safetensors"
FORMAT = 3
_RACY_NS = 2 * 10**9  # a later change within the clock's tick might have the same time
_CHUNK, _SECONDS_BETWEEN_SAVES = 512, 30.0
_MANY = 5_000  # files that take some seconds to check: announced where no bar shows it
_CHANGED = "its bytes have changed while its size and time have not: it is damaged (restore it), or changed on purpose"
_log = logging.getLogger("ssl_pipeline")


@dataclass
class ImageIndex:
    """A folder's files, sorted by name.

    Attributes:
        root: the folder.
        columns: of all files with an image's ending or content, as :class:`FileTable` has them.
        folders: paths of all folders below the root, its own (``.``) first.
        folder_mtimes: of each folder, ns.
        ignored: the files that are not taken for images.
        began: when the folder was listed, ns.
        faults: what can be wrong with a file, in words, and its number; the first is "".
        modes: how images are stored, and its number; the first is "".
        cache_side: what the cached images' shorter sides are limited to; 0 without a cache.
    """

    root: Path
    columns: dict[str, np.ndarray]
    folders: list[str]
    folder_mtimes: list[int]
    ignored: list[IgnoredFiles]
    began: int
    faults: dict[str, int] = field(default_factory=lambda: {"": 0})
    modes: dict[str, int] = field(default_factory=lambda: {"": 0})
    cache_side: int = 0

    @property
    def files(self) -> FileTable:
        return FileTable(self.columns)

    @property
    def whole(self) -> bool:
        """Whether every file was checked: an interrupted check leaves the rest for the next one."""
        return bool((self.columns["checked"] > UNCHECKED).all())

    def faults_of(self, files: FileTable) -> dict[str, str]:
        """Of the files that are no images what is wrong with them."""
        words, codes = list(self.faults), files.column("fault")
        return {files[i]: words[codes[i]] for i in codes.nonzero()[0].tolist()}

    def is_fresh(self) -> bool:
        """Whether no file was added, removed or renamed since."""
        for folder, mtime in zip(self.folders, self.folder_mtimes, strict=True):
            try:
                now = (self.root / folder).stat().st_mtime_ns
            except OSError:
                return False
            if now != mtime or now > self.began - _RACY_NS:
                return False
        return True

    def save(self, place: Path) -> None:
        """Writes the index; whoever reads the one before goes on reading that."""
        names = self.columns["name"]
        tensors = {name: torch.from_numpy(column) for name, column in self.columns.items() if name != "name"}
        tensors["name"] = torch.from_numpy(names.view(np.uint8).reshape(len(names), names.itemsize))
        about = {key: value for key, value in vars(self).items() if key not in ("root", "columns")}
        about |= {"format": FORMAT, "root": str(self.root), "ignored": [asdict(one) for one in self.ignored]}
        place.mkdir(parents=True, exist_ok=True)
        with atomic_write(place / FILE_NAME) as path:
            save_file(tensors, path, {"about": json.dumps(about)})

    @classmethod
    def load(cls, place: Path, root: Path) -> ImageIndex | None:
        """Maps a folder's index; None where there is none, or it is damaged, of another format or another folder."""
        try:
            with safe_open(place / FILE_NAME, "pt") as stored:
                about = json.loads(stored.metadata()["about"])
                if about.pop("format") != FORMAT or about.pop("root") != str(root):
                    return None
                columns = {name: stored.get_tensor(name).numpy() for name in COLUMNS}
                names = stored.get_tensor("name").numpy()
            columns["name"] = names.view(f"S{names.shape[1]}")[:, 0]
            about["ignored"] = [IgnoredFiles(**one) for one in about["ignored"]]
            return cls(root, columns, **about)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None


def index_folder(root: Path, base: Path | None = None) -> Path:
    """Where a folder's index is kept: below ``base``, or in this user's cache."""
    own, shared = os.environ.get("SSL_PIPELINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(own) if own else Path(shared or "~/.cache") / "ssl_pipeline"
    digest = hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()
    return (base or cache.expanduser() / "folders") / f"{root.name}-{digest}"


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
        index = _list(root)
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


def _list(root: Path) -> ImageIndex:
    """All files, none of them checked."""
    began = time.time_ns()
    folders, found, ignored = list_images(root)
    columns = FileTable.of([entry[0] for entry in found]).columns
    for place, name in enumerate(("bytes", "mtime", "folder"), 1):
        columns[name] = np.array([entry[place] for entry in found], COLUMNS[name])
    return ImageIndex(root, columns, list(folders), list(folders.values()), ignored, began)


def _reuse(index: ImageIndex, old: ImageIndex) -> None:
    """Takes over what is known of files whose name, size and time have not changed."""
    new, before = index.columns, old.columns
    _, here, there = np.intersect1d(new["name"], before["name"], assume_unique=True, return_indices=True)
    same = (new["bytes"][here] == before["bytes"][there]) & (new["mtime"][here] == before["mtime"][there])
    same &= before["mtime"][there] < old.began - _RACY_NS
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
    places, files = due.nonzero()[0].tolist(), index.files
    if len(places) >= _MANY and not console().is_terminal and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"checking {len(places):,} files of {index.root}; the results are kept for the next time\n")
    began = saved = time.monotonic()
    with ExitStack() as stack:
        if place is not None:
            stack.callback(lambda: index.save(place))  # also when it is interrupted
        writer = None
        if side and place is not None and places:
            writer = stack.enter_context(CacheWriter(cache_folder(place, side)))
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)) if level == PIXELS else 16))
        bar = stack.enter_context(counting_bar())
        task = bar.add_task(f"checking {index.root.name}", total=len(places))
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            paths = [index.root / files[i] for i in chunk]
            for i, found in zip(chunk, pool.map(lambda path: _check_file(path, level, side), paths), strict=True):
                _enter(index, i, found, level, writer)
                bar.advance(task)
            if place is not None and time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                if writer is not None:
                    writer.flush()
                index.save(place)
                saved = time.monotonic()
    if places:
        _log.info("checked %d files of %s in %.1f s", len(places), index.root, time.monotonic() - began)


def counting_bar() -> Progress:
    """The progress of a check; only the main process shows it, in a terminal."""
    quiet = not console().is_terminal or os.environ.get("RANK", "0") != "0"
    columns = TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn()
    return Progress(*columns, console=console(), disable=quiet, transient=True)


def _check_file(path: Path, level: int, cache_side: int) -> tuple[Header | None, str, int, Any]:
    """A file's header, what is wrong with it, the digest of its bytes, and its image for the cache."""
    header = check_header(path)
    if isinstance(header, str):
        return None, header, 0, None
    if level < PIXELS:
        return header, "", 0, None
    try:
        data = path.read_bytes()
    except OSError as error:
        return header, explain(path, error), 0, None
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
    try:
        # Without a cache a JPEG is decoded at an eighth of its size, which reads it to its end in a third of the time.
        image = decode_bytes(data, path, 1 if is_grayscale(header.mode) else 3, cache_side or 1)
    except DecodeError as error:
        return header, error.fault, digest, None
    keeps = cache_side and not header.values["kind"]  # the cache holds 8 bits
    return header, "", digest, limited(image, cache_side) if keeps else None


def _enter(
    index: ImageIndex, row: int, found: tuple[Header | None, str, int, Any], level: int, writer: CacheWriter | None
) -> None:
    header, fault, digest, image = found
    values: dict[str, Any] = {"checked": level}
    if header is not None:
        values |= {"width": header.width, "height": header.height, **header.values}
        values["mode"] = index.modes.setdefault(header.mode, len(index.modes))
        values["traits"] = sum(1 << bit for bit, name in enumerate(TRAITS) if name in header.traits)
    known = int(index.columns["digest"][row])
    changed = known and digest and known != digest
    fault = fault or (_CHANGED if changed else "")
    values["fault"] = index.faults.setdefault(fault, len(index.faults))
    if not changed:  # otherwise it is reported again until the file is restored, or has another time
        values["digest"] = digest
    if writer is not None and image is not None:
        values |= writer.add(image)
    for name, value in values.items():
        index.columns[name][row] = value
