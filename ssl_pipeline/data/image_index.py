"""What is known of the images in a folder: a table of its files, and the index that keeps it for the next start.

An index lies outside its folder: in this user's cache (``$SSL_PIPELINE_CACHE``, otherwise ``$XDG_CACHE_HOME/ssl_pipeline`` or
``~/.cache/ssl_pipeline``), or where ``ssl-pipeline prepare --output`` puts it. It is one safetensors file, which processes map
and share. It holds as long as no folder's modification time has changed, so no file was added, removed or renamed; a file that
was overwritten in place is only seen by ``ssl-pipeline prepare``, or by its size when it is decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssl_pipeline.config.files import atomic_write
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS

FILE_NAME = "index.safetensors"
FORMAT = 3
UNCHECKED, HEADER, PIXELS = 0, 1, 2
TRAITS = ("animated", "rotated", "transparent")
COLUMNS: dict[str, Any] = {
    "bytes": np.int64,  # the file's size; −1 where it is not known
    "mtime": np.int64,  # ns
    "folder": np.int32,  # which of the folders it lies in
    "checked": np.uint8,  # not yet, its header, or all its pixels
    "fault": np.int32,  # which of the faults it has; 0 for none
    "width": np.int32,  # as it is seen, after EXIF rotation; 0 where it is not known
    "height": np.int32,
    "mode": np.uint8,  # which of the modes
    "traits": np.uint8,  # one bit for each of TRAITS
    "digest": np.int64,  # of its bytes (BLAKE2b); 0 where they were not all read
    **VALUE_COLUMNS,
    **CACHE_COLUMNS,
}
RACY_NS = 2 * 10**9  # a later change within the clock's tick might have the same time


def as_text(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes in it that are no UTF-8 are escaped, E9 as ``\udce9``."""
    return name.encode("utf-8", "backslashreplace").decode()


def first_levels(folder: str, levels: int) -> str:
    """The first levels of a folder's path; "" if it has fewer."""
    names = [] if folder in (".", "") else folder.split("/")
    return "/".join(names[:levels]) if len(names) >= levels else ""


class FileTable:
    """Relative posix paths, and what is known of each file, in arrays: a million Python strings cost each process 100 MB.

    Args:
        columns: an array for each of :data:`COLUMNS`, and ``name``, the paths as bytes.
        rows: the chosen files, int64 of shape (N,); None for all. A selection shares the columns of the whole.
    """

    def __init__(self, columns: dict[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        self.columns, self._rows = columns, rows

    @classmethod
    def of(cls, names: FileTable | Sequence[str]) -> FileTable:
        """Files of which only the names are known."""
        if isinstance(names, FileTable):
            return names
        columns = {name: np.zeros(len(names), kind) for name, kind in COLUMNS.items()}
        columns["bytes"] -= 1
        columns["shard"] -= 1
        return cls({"name": np.array([os.fsencode(name) for name in names], np.bytes_), **columns})

    def __len__(self) -> int:
        return len(self.columns["name"] if self._rows is None else self._rows)

    def __getitem__(self, place: int) -> str:
        return os.fsdecode(self.columns["name"][place if self._rows is None else self._rows[place]])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.column("name"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileTable | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def column(self, name: str, index: Tensor | None = None) -> np.ndarray:
        """One value for each of the chosen files, or for some of them."""
        rows = self._rows
        if index is not None:
            rows = index.numpy() if rows is None else rows[index.numpy()]
        return self.columns[name] if rows is None else self.columns[name][rows]

    def row(self, place: int, names: Iterable[str]) -> dict[str, int]:
        """Some columns of one file."""
        row = place if self._rows is None else self._rows[place]
        return {name: int(self.columns[name][row]) for name in names}

    def select(self, index: Tensor | np.ndarray) -> FileTable:
        """Some of the chosen files, by their places or as a mask."""
        rows = np.asarray(index)
        rows = rows.nonzero()[0] if rows.dtype == bool else rows
        return FileTable(self.columns, rows if self._rows is None else self._rows[rows])


@dataclass(frozen=True)
class IgnoredFiles:
    """Files of one folder and one ending (in lower case; "" for none) that are not taken for images; one is the example."""

    folder: str
    ending: str
    count: int
    example: str


def causes(ignored: Iterable[IgnoredFiles], faults: Mapping[str, str]) -> list[str]:
    """Why files are no images, a phrase for each cause, the most frequent first; ``faults`` are those of unreadable images."""
    count, example = Counter[str](), dict[str, str]()
    for one in ignored:
        phrase = f"end in {one.ending}, which is not read" if one.ending else "have no ending and hold no image"
        count[phrase] += one.count
        example.setdefault(phrase, one.example)
    for file, fault in faults.items():
        phrase = f"can't be read: {fault}"
        count[phrase] += 1
        example.setdefault(phrase, file)
    return [f"{number} {phrase} ({example[phrase]})" for phrase, number in count.most_common(5)]


@dataclass
class ImageIndex:
    """A folder's files, sorted by name.

    Attributes:
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
        try:
            now = [(self.root / folder).stat().st_mtime_ns for folder in self.folders]
        except OSError:
            return False
        return now == self.folder_mtimes and max(now) <= self.began - RACY_NS

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
