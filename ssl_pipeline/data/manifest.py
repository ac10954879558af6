"""What one look at a folder found, on disk: one row a file, memory-mapped, so that every later start is fast.

A manifest lives outside the folder it describes: in this user's cache (``$SSL_PIPELINE_CACHE``, otherwise
``$XDG_CACHE_HOME/ssl_pipeline`` or ``~/.cache/ssl_pipeline``), under the folder's resolved path, or where
``ssl-pipeline prepare --output`` was told to put it. It is one safetensors file, which processes map and share.

It is taken as it is for as long as no folder's modification time has changed, so no file was added, removed or renamed.
A file that was overwritten in place is only seen by ``ssl-pipeline prepare``, or by its size when it is decoded.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.files import FileTable
from ssl_pipeline.data.lost_files import Others
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS

FILE_NAME = "manifest.safetensors"
FORMAT = 2
UNCHECKED, HEADER, PIXELS = 0, 1, 2
TRAITS = ("animated", "rotated", "transparent")
COLUMNS: dict[str, Any] = {
    "bytes": np.int64,  # the file's size
    "mtime": np.int64,  # ns
    "folder": np.int32,  # which of the folders it lies in
    "checked": np.uint8,  # not yet, its header, or all its pixels
    "fault": np.int32,  # which of the faults it has; 0 for none
    "width": np.int32,  # as it is seen, after EXIF rotation
    "height": np.int32,
    "mode": np.uint8,  # which of the modes
    "traits": np.uint8,  # one bit for each of TRAITS
    "digest": np.int64,  # of its bytes (BLAKE2b); 0 where they were not all read
    **VALUE_COLUMNS,
    **CACHE_COLUMNS,
}
RACY_NS = 2 * 10**9


def new_rows(count: int) -> np.ndarray:
    """Rows of unchecked files, not in any cache: a structured array of shape (count,)."""
    rows = np.zeros(count, np.dtype(list(COLUMNS.items())))
    rows["shard"] = -1
    return rows


@dataclass(frozen=True)
class Manifest:
    """A folder's files, sorted by name.

    Attributes:
        root: the folder.
        files: all files with an image's ending, and the columns of each.
        folders: paths of all folders below the root, its own (``.``) first.
        folder_mtimes: of each folder, ns.
        faults: what can be wrong with a file, in words; the first is "".
        modes: how images are stored; the first is "".
        others: the files that are not taken for images.
        began: when the look at the folder began, ns.
        whole: whether every file was checked: a look that was interrupted leaves the rest for the next.
        cache_side: what the cached images' shorter sides are limited to; 0 without a cache.
    """

    root: Path
    files: FileTable
    folders: FileTable
    folder_mtimes: torch.Tensor
    faults: tuple[str, ...]
    modes: tuple[str, ...]
    others: tuple[Others, ...]
    began: int
    whole: bool
    cache_side: int = 0

    def rows(self) -> np.ndarray:
        """A copy of all columns as one structured array."""
        rows = new_rows(len(self.files))
        for name in COLUMNS:
            column = self.files.column(name)
            assert column is not None
            rows[name] = column.numpy()
        return rows

    def is_fresh(self) -> bool:
        """Whether no file was added, removed or renamed since.

        A folder that changed within two seconds of the look may have changed again within the clock's tick: not fresh.
        """
        for folder, mtime in zip(self.folders, self.folder_mtimes.tolist(), strict=True):
            try:
                now = (self.root / folder).stat().st_mtime_ns
            except OSError:
                return False
            if now != mtime or now > self.began - RACY_NS:
                return False
        return True


def save(manifest: Manifest, place: Path) -> None:
    """Writes a manifest; whoever reads the one before goes on reading that."""
    folders = manifest.folders.packed()
    tensors = dict(zip(("names", "ends"), manifest.files.packed(), strict=True))
    tensors |= {"folder_names": folders[0], "folder_ends": folders[1], "folder_mtimes": manifest.folder_mtimes}
    for name in COLUMNS:
        column = manifest.files.column(name)
        assert column is not None
        tensors[name] = column
    told = {
        "format": FORMAT, "root": str(manifest.root), "faults": manifest.faults, "modes": manifest.modes,
        "others": [dataclasses.astuple(one) for one in manifest.others], "began": manifest.began, "whole": manifest.whole, "cache_side": manifest.cache_side,
    }  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    new = place / f"{FILE_NAME}.new"
    save_file(tensors, new, {"told": json.dumps(told)})
    new.replace(place / FILE_NAME)


def load(place: Path, root: Path) -> Manifest | None:
    """Maps a folder's manifest; None where there is none, or it is damaged, of another format or another folder."""
    path = place / FILE_NAME
    try:
        with safe_open(path, "pt") as stored:
            told = json.loads(stored.metadata()["told"])
            if told["format"] != FORMAT or told["root"] != str(root):
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
        columns = {name: tensors[name] for name in COLUMNS}
        return Manifest(
            root, FileTable(tensors["names"], tensors["ends"], columns), FileTable(tensors["folder_names"], tensors["folder_ends"]),
            tensors["folder_mtimes"], tuple(told["faults"]), tuple(told["modes"]),
            tuple(Others(*one) for one in told["others"]),
            told["began"], told["whole"], told["cache_side"],
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def place_of(root: Path, base: Path | None = None) -> Path:
    """Where a folder's manifest is kept: below ``base``, or in this user's cache."""
    own, shared = os.environ.get("SSL_PIPELINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(own) if own else Path(shared or "~/.cache") / "ssl_pipeline"
    digest = hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()
    return (base or cache.expanduser() / "folders") / f"{root.name}-{digest}"


def made_place(root: Path, output: str | None) -> Path:
    """The same as a folder that is there.

    Args:
        root: the folder of images, resolved.
        output: where the user wants it, which must not be in there.

    Raises:
        ConfigError: it is, or can't be written.
    """
    base = Path(output).expanduser().resolve() if output else None
    place = place_of(root, base)
    if base is not None and base.is_relative_to(root):
        raise ConfigError(f"`--output`: {output!r} lies in the folder of images, in which nothing is changed.")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{str(place)!r} can't be written ({error.strerror}): give `--output FOLDER`.") from error
    return place


@contextmanager
def locked(place: Path) -> Iterator[bool]:
    """One process at a time looks at a folder; the others wait, and find its manifest.

    Yields:
        Whether that is certain: some network file systems have no locks, and there two looks at once are waste, not harm.

    Raises:
        OSError: nothing can be written there.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as file:
        alone = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        yield alone
