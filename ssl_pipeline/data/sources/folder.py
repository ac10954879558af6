"""A folder of image files: flat and without labels, or one folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.decode import header_fault
from ssl_pipeline.data.source import FileSource, SourceConfig, Split
from ssl_pipeline.data.splits import hold_out

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
_TOLD = 10


class Config(SourceConfig):
    """A folder of your own.

    If images lie in the folder itself, it is flat: all images in it and below are taken, without labels. If they all lie in
    subfolders, each of them is a class. If it holds ``train`` and ``test`` (or ``val``), these are the splits.

    Attributes:
        path: the folder. Nothing in it is changed.
        test_path: another folder, of the same classes, to measure on.
        channels: 3 for RGB, 1 for grey.
        dev: the share of labelled training images that is held out for choices.
        test: the share that is held out for the final figures where there is no test folder.
        on_unreadable: files that are no images ``stop`` the run before it starts, with a list, or are left out (``skip``).
    """

    path: str
    test_path: str | None = None
    channels: Literal[1, 3] = 3
    dev: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    on_unreadable: Literal["stop", "skip"] = "stop"

    def open(self, split: Split) -> FileSource | None:
        """A split, the same for every seed; ``dev`` and ``test`` need labels."""
        root = Path(self.path).expanduser()
        skip, inside = self.on_unreadable == "skip", root
        test_folder = Path(self.test_path).expanduser() if self.test_path else None
        if test_folder is None and (root / "train").is_dir():
            named = [root / name for name in ("test", "val") if (root / name).is_dir()]
            if named:
                inside, test_folder = root / "train", named[0]
        scan = _scan(inside, skip)
        if scan.classes is None:
            return scan.source(self.channels) if split == "train" else None
        if split == "test" and test_folder is not None:
            return _scan(test_folder, skip).relabelled(scan.classes).source(self.channels)
        labels = torch.tensor(scan.labels)
        rest = torch.arange(len(labels))
        if test_folder is None:
            rest, test = hold_out(labels, max(1, round(self.test * len(labels))), "folder", "test")
            if split == "test":
                return scan.source(self.channels).select(test)
        train, dev = hold_out(labels[rest], max(1, round(self.dev * len(rest))), "folder", "dev")
        return scan.source(self.channels).select(rest[train if split == "train" else dev])


@dataclass(frozen=True)
class _Scan:
    """What a folder holds: files relative to it, and per file its class."""

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...] | None
    labels: tuple[int, ...]

    def source(self, channels: int) -> FileSource:
        labels: Tensor | None = torch.tensor(self.labels) if self.classes is not None else None
        return FileSource(str(self.root), self.root, self.files, channels, labels, self.classes)

    def relabelled(self, classes: tuple[str, ...]) -> _Scan:
        """The same files, numbered by the training folder's classes."""
        own = self.classes or ()
        unknown = [name for name in own if name not in classes]
        if not own or unknown:
            raise ConfigError(
                f"{str(self.root)!r} has {'no class folders' if not own else f'classes that training has not: {unknown}'}; "
                f"it needs those of the training folder: {', '.join(classes)}."
            )
        return _Scan(self.root, self.files, classes, tuple(classes.index(own[label]) for label in self.labels))


@lru_cache(maxsize=8)
def _scan(root: Path, skip: bool) -> _Scan:
    if not root.is_dir():
        what = "is a file, and a folder is needed" if root.exists() else "does not exist"
        raise ConfigError(f"`data.path`: {str(root)!r} {what}.")
    files = sorted(file for file in _walk(root) if Path(file).suffix.lower() in ENDINGS)
    files = _readable(root, files, skip)
    if len(files) < 2:
        found = "no image" if not files else f"only one image ({files[0]})"
        raise ConfigError(f"`data.path`: {str(root)!r} holds {found}; files with {', '.join(sorted(ENDINGS))} count.")
    if any("/" not in file for file in files):
        return _Scan(root, tuple(files), None, ())
    classes = tuple(sorted({file.split("/")[0] for file in files}))
    return _Scan(root, tuple(files), classes, tuple(classes.index(file.split("/")[0]) for file in files))


def _walk(root: Path) -> Iterator[str]:
    """Relative posix paths of all visible files; links are followed, each real folder once, so that a loop ends."""
    seen, pending = {root.resolve()}, [root]
    while pending:
        for entry in os.scandir(pending.pop()):
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if entry.is_dir():
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    pending.append(path)
            else:
                yield path.relative_to(root).as_posix()


def _readable(root: Path, files: list[str], skip: bool) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        faults = dict(zip(files, pool.map(lambda file: header_fault(root / file), files), strict=True))
    bad = [f"{root / file}: {fault}" for file, fault in faults.items() if fault]
    if bad and not skip:
        told = [*bad[:_TOLD], *([f"… and {len(bad) - _TOLD} more"] if len(bad) > _TOLD else [])]
        raise ConfigError(
            [*told, f"{len(bad)} of {len(files)} files are no images: remove them, or set `data.on_unreadable=skip`."]
        )
    if bad:
        logging.getLogger("ssl_pipeline").warning("left out %d files that are no images, such as %s", len(bad), bad[0])
    return [file for file in files if not faults[file]]
