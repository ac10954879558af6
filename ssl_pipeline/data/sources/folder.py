"""A folder of image files: flat and without labels, or one folder per class."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFiles, BadFilesLimit, Limit, parse_limit
from ssl_pipeline.data.cache import Cache
from ssl_pipeline.data.file_source import FileSource
from ssl_pipeline.data.files import Files
from ssl_pipeline.data.manifest import place_of
from ssl_pipeline.data.scan import ENDINGS, cache_folder, look
from ssl_pipeline.data.source import SourceConfig, Split
from ssl_pipeline.data.splits import hold_out

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
        bad_files: how many files that can't be read as images are borne, ``20`` or ``1%`` of all: those found at the start
            are left out, one found later is replaced by its neighbour. More stop the run, with a list.
        prepared: where ``ssl-pipeline prepare --output`` was told to write; null is this user's cache.
        cache: read the decoded images that ``ssl-pipeline prepare --cache`` has written, rather than the files.
    """

    path: str
    test_path: str | None = None
    channels: Literal[1, 3] = 3
    dev: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    bad_files: Limit = parse_limit("1%")
    prepared: str | None = None
    cache: bool = False

    def open(self, split: Split) -> FileSource | None:
        """A split, the same for every seed; ``dev`` and ``test`` need labels.

        Raises:
            ConfigError: a folder is missing, empty, holds unreadable files, or its classes do not fit.
        """
        folders, prepared = self.folders(), Path(self.prepared).expanduser().resolve() if self.prepared else None
        train = _scan(folders["train"], "data.path", self.bad_files, prepared)
        if train.classes is None:
            return train.source(self) if split == "train" else None
        if split in folders and split != "train":
            key = "data.test_path" if split == "test" and self.test_path else "data.path"
            return _scan(folders[split], key, self.bad_files, prepared).relabelled(train.classes).source(self)
        test, dev = (None if name in folders else share for name, share in (("test", self.test), ("dev", self.dev)))
        return train.source(self).select(_held_out(folders["train"], self.bad_files, prepared, test, dev)[split])

    def folders(self) -> dict[Split, Path]:
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


@dataclass(frozen=True)
class _Scan:
    """What a folder holds that can be used.

    Attributes:
        root: the folder.
        files: the images in it.
        classes: the names of its subfolders, sorted; None without labels.
        labels: per file the number of its class, int64 of shape (N,); None without.
        tops: per folder the subfolder of the root it lies in, "" for the root itself.
        faults: of the files left out, what is wrong with them.
        place: where its manifest is.
        cache_side: what the cached images' shorter sides are limited to; 0 without a cache.
    """

    root: Path
    files: Files
    classes: tuple[str, ...] | None
    labels: Tensor | None
    tops: tuple[str, ...]
    faults: dict[str, str]
    place: Path
    cache_side: int

    def source(self, config: Config) -> FileSource:
        """As a source.

        Raises:
            ConfigError: the cache is wanted, and there is none.
        """
        cache = None
        if config.cache:
            if not self.cache_side:
                raise ConfigError(
                    f"`data.cache`: {str(self.root)!r} has no cache of decoded images yet. Make it first, with "
                    f"`ssl-pipeline prepare {self.root} --cache 256`"
                    + (f" --output {config.prepared}`." if config.prepared else ".")
                )
            cache = Cache(cache_folder(self.place, self.cache_side), self.cache_side)
            shards = self.files.column("shard")
            lacking = 0 if shards is None else int((shards < 0).sum())
            if lacking:
                _log.warning(
                    "%d of %d images in %s are new since its cache was made, and are decoded anew each time: "
                    "`ssl-pipeline prepare` with `--cache %d` adds them.",
                    lacking, len(self.files), self.root, self.cache_side,
                )  # fmt: skip
        bad_files = BadFiles(config.bad_files, len(self.files) + len(self.faults), self.faults)
        return FileSource(
            str(self.root), self.root, self.files, config.channels, self.labels, self.classes, self.skipped(),
            cache=cache, bad_files=bad_files,
        )  # fmt: skip

    def skipped(self) -> list[str]:
        """The files left out, relative to the root."""
        return [file.removeprefix(f"{self.root}/") for file in self.faults]

    def relabelled(self, classes: tuple[str, ...]) -> _Scan:
        """The same files, numbered by the training folder's classes."""
        if "" in self.used():
            raise ConfigError(
                f"{str(self.root)!r} has no class folders; it needs those of training: {_listed(classes)}."
            )
        unknown = sorted(self.used() - set(classes))
        if unknown:
            raise ConfigError(
                f"{str(self.root)!r} has classes that training has not: {_listed(unknown)}; it may only have those of the "
                f"training folder: {_listed(classes)}. Rename or remove the folders."
            )
        return replace(self, classes=classes, labels=self.numbered(classes))

    def _folders(self) -> Tensor:
        folders = self.files.column("folder")
        assert folders is not None
        return folders.long()

    def used(self) -> set[str]:
        """The subfolders of the root that hold images."""
        return {self.tops[folder] for folder in self._folders().unique().tolist()}

    def numbered(self, classes: tuple[str, ...]) -> Tensor:
        """Per file the number of its subfolder."""
        number = {name: place for place, name in enumerate(classes)}
        return torch.tensor([number.get(top, -1) for top in self.tops])[self._folders()]


@lru_cache(maxsize=8)
def _scan(root: Path, key: str, limit: BadFilesLimit, prepared: Path | None) -> _Scan:
    """Reads a folder once in the process's life; ``key`` is what messages call it."""
    place = place_of(root, prepared)
    manifest = look(root, place)
    codes = manifest.files.column("fault")
    assert codes is not None
    bad = codes.nonzero()[:, 0]
    faults = {str(root / manifest.files[i]): manifest.faults[int(codes[i])] for i in bad.tolist()}
    files = manifest.files if not faults else manifest.files.select((codes == 0).nonzero()[:, 0])
    BadFiles(limit, len(manifest.files), faults).stop_if_too_many(len(faults))
    if len(files) < 2:
        what = "no image" if not files else f"only one image ({files[0]})"
        raise ConfigError(
            f"`{key}`: {str(root)!r} holds {what}, and at least two are needed; files with {', '.join(sorted(ENDINGS))} count."
        )
    if manifest.others[0]:
        _log.info("ignored %d other files in %s, such as %s", manifest.others[0], root, manifest.others[1])
    if faults:
        first = next(iter(faults.items()))
        told = f"{first[0]}: {first[1]}"
        _log.warning("left out %d files of %d that are no images, such as %s", len(faults), len(manifest.files), told)
    tops = tuple("" if folder == "." else folder.split("/")[0] for folder in manifest.folders)
    scan = _Scan(root, files, None, None, tops, faults, place, manifest.cache_side)
    classes = tuple(sorted(scan.used()))
    if "" in classes or len(classes) == 1:
        return scan
    return replace(scan, classes=classes, labels=scan.numbered(classes))


@lru_cache(maxsize=8)
def _held_out(
    root: Path, limit: BadFilesLimit, prepared: Path | None, test: float | None, dev: float | None
) -> dict[str, Tensor]:
    """Per split its samples of the training folder; None where a split has a folder of its own."""
    labels = _scan(root, "data.path", limit, prepared).labels
    assert labels is not None
    index = {"train": torch.arange(len(labels))}
    for split, share in (("test", test), ("dev", dev)):
        if share is not None:
            pool = index["train"]
            rest, held_out = hold_out(labels[pool], max(1, round(share * len(pool))), "folder", split)
            index["train"], index[split] = pool[rest], pool[held_out]
    return index


def _listed(names: tuple[str, ...] | list[str]) -> str:
    """Names for a message, cut short where there are many."""
    return ", ".join(names[:_TOLD]) + (f", … ({len(names)} in all)" if len(names) > _TOLD else "")
