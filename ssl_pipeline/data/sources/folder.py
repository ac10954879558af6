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
from ssl_pipeline.data.decode import check_header
from ssl_pipeline.data.source import FileSource, SourceConfig, Split
from ssl_pipeline.data.splits import hold_out

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
_TOLD = 10
_log = logging.getLogger("ssl_pipeline")


class Config(SourceConfig):
    """A folder of your own.

    If images lie in the folder itself, it is flat: all images in it and below are taken, without labels. If they all lie in
    subfolders, each of them is a class; a single one is no class, and its images are taken without labels. If the folder
    holds ``train`` and ``test``, these are the splits, and so is ``val``, as ``dev``; without ``test``, ``val`` is the test.

    Attributes:
        path: the folder. Nothing in it is changed.
        test_path: another folder, of the same classes, to measure on.
        channels: 3 for RGB, 1 for grey.
        dev: the share of labelled training images that is held out for choices.
        test: the share that is held out for the final figures where there is no test folder.
        on_unreadable: files whose header is no image's ``stop`` the run before it starts, with a list, or are left out
            (``skip``).
    """

    path: str
    test_path: str | None = None
    channels: Literal[1, 3] = 3
    dev: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    on_unreadable: Literal["stop", "skip"] = "stop"

    def open(self, split: Split) -> FileSource | None:
        """A split, the same for every seed; ``dev`` and ``test`` need labels.

        Raises:
            ConfigError: a folder is missing, empty, holds unreadable files, or its classes do not fit.
        """
        folders = self._folders()
        skip = self.on_unreadable == "skip"
        train = _scan(folders["train"], "data.path", skip)
        if train.classes is None:
            return train.source(self.channels) if split == "train" else None
        if split in folders and split != "train":
            key = "data.test_path" if split == "test" and self.test_path else "data.path"
            return _scan(folders[split], key, skip).relabelled(train.classes).source(self.channels)
        index = _held_out(
            train.labels, None if "test" in folders else self.test, None if "dev" in folders else self.dev
        )
        return train.source(self.channels).select(index[split])

    def _folders(self) -> dict[Split, Path]:
        """The folders that splits have of their own."""
        root = _existing(self.path, "data.path")
        folders: dict[Split, Path] = {"train": root}
        if (root / "train").is_dir():
            named = [name for name in ("test", "val") if (root / name).is_dir()]
            if named:
                folders = {"train": root / "train", "test": root / named[0]}
            if len(named) == 2:
                folders["dev"] = root / "val"
        if self.test_path is not None:
            folders["test"] = _existing(self.test_path, "data.test_path")
            if folders["test"].is_relative_to(folders["train"]):
                raise ConfigError(
                    f"`data.test_path`: {self.test_path!r} lies in the training folder {str(folders['train'])!r}, so its images "
                    "would be trained on: move it out."
                )
        return folders


def _existing(given: str, key: str) -> Path:
    """A folder of the user's, resolved, so that what is cached for it outlives a change of the working directory."""
    path = Path(given).expanduser()
    if not path.is_dir():
        what = "is a file, and a folder is needed" if path.exists() else "does not exist"
        raise ConfigError(f"`{key}`: {given!r} {what}: give the folder that holds the images.")
    return path.resolve()


@lru_cache(maxsize=8)
def _held_out(labels: tuple[int, ...], test: float | None, dev: float | None) -> dict[str, Tensor]:
    """Per split its samples of the training folder; None where a split has a folder of its own."""
    every = torch.tensor(labels)
    index = {"train": torch.arange(len(every))}
    for split, share in (("test", test), ("dev", dev)):
        if share is not None:
            pool = index["train"]
            rest, held_out = hold_out(every[pool], max(1, round(share * len(pool))), "folder", split)
            index["train"], index[split] = pool[rest], pool[held_out]
    return index


@dataclass(frozen=True)
class _Scan:
    """What a folder holds: files relative to it, and per file its class.

    Attributes:
        root: the folder.
        files: posix paths relative to it, sorted.
        classes: the names of its subfolders, sorted; None without labels.
        labels: per file the number of its class; empty without.
        subfolder: the one subfolder that holds everything, if there is one: too few to be classes.
        skipped: files left out because they are no images.
    """

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...] | None
    labels: tuple[int, ...]
    subfolder: str | None
    skipped: tuple[str, ...]

    def source(self, channels: int) -> FileSource:
        labels: Tensor | None = torch.tensor(self.labels) if self.classes is not None else None
        return FileSource(str(self.root), self.root, self.files, channels, labels, self.classes, self.skipped)

    def relabelled(self, classes: tuple[str, ...]) -> _Scan:
        """The same files, numbered by the training folder's classes."""
        if self.classes is None and self.subfolder is None:
            raise ConfigError(
                f"{str(self.root)!r} has no class folders; it needs those of training: {_listed(classes)}."
            )
        own = [file.split("/")[0] for file in self.files]
        unknown = sorted(set(own) - set(classes))
        if unknown:
            raise ConfigError(
                f"{str(self.root)!r} has classes that training has not: {_listed(unknown)}; it may only have those of the "
                f"training folder: {_listed(classes)}. Rename or remove the folders."
            )
        number = {name: place for place, name in enumerate(classes)}
        return _Scan(self.root, self.files, classes, tuple(number[name] for name in own), None, self.skipped)


@lru_cache(maxsize=8)
def _scan(root: Path, key: str, skip: bool) -> _Scan:
    """Reads a folder once in the process's life; ``key`` is what messages call it."""
    found = sorted(_walk(root))
    candidates = [file for file in found if Path(file).suffix.lower() in ENDINGS]
    others = [file for file in found if Path(file).suffix.lower() not in ENDINGS]
    files, skipped = _readable(root, candidates, skip)
    if len(files) < 2:
        what = "no image" if not files else f"only one image ({files[0]})"
        raise ConfigError(
            f"`{key}`: {str(root)!r} holds {what}, and at least two are needed; files with {', '.join(sorted(ENDINGS))} count."
        )
    if others:
        _log.info("ignored %d other files in %s, such as %s", len(others), root, others[0])
    first = sorted({file.split("/")[0] for file in files})
    if any("/" not in file for file in files):
        return _Scan(root, files, None, (), None, skipped)
    if len(first) == 1:
        return _Scan(root, files, None, (), first[0], skipped)
    number = {name: place for place, name in enumerate(first)}
    return _Scan(root, files, tuple(first), tuple(number[file.split("/")[0]] for file in files), None, skipped)


def _walk(root: Path) -> Iterator[str]:
    """Relative posix paths of all visible files; links are followed, each real folder once, so that a loop ends.

    Folders are visited in the order of their names: of two links to one folder the same is taken on every machine.
    """
    seen, pending = {root.resolve()}, [root]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(
                f"{str(folder)!r} can't be listed ({error.strerror}): make it readable or take it out."
            ) from error
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if not _is_folder(entry):
                yield path.relative_to(root).as_posix()
            elif path.resolve() not in seen:
                seen.add(path.resolve())
                below.append(path)
        pending += reversed(below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that can't be read, which the check of headers tells
        return False


def _readable(root: Path, files: list[str], skip: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files whose header is an image's, and the others."""
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda file: check_header(root / file), files))
    faults = {file: header for file, header in zip(files, headers, strict=True) if isinstance(header, str)}
    told = [f"{root / file}: {fault}" for file, fault in list(faults.items())[:_TOLD]]
    if faults and not skip:
        more = [f"… and {len(faults) - _TOLD} more"] if len(faults) > _TOLD else []
        raise ConfigError(
            [
                *told,
                *more,
                f"{len(faults)} of {len(files)} files are no images: remove them, or set `data.on_unreadable=skip`.",
            ]
        )
    if faults:
        _log.warning("left out %d files of %d that are no images, such as %s", len(faults), len(files), told[0])
    return tuple(file for file in files if file not in faults), tuple(faults)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    """Names for a message, cut short where there are many."""
    return ", ".join(names[:_TOLD]) + (f", … ({len(names)} in all)" if len(names) > _TOLD else "")
