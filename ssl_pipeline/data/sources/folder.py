"""A folder of image files: flat and without labels, or one folder per class."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFilesLimit
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.file_source import FileDataset
from ssl_pipeline.data.files import as_text
from ssl_pipeline.data.lost_files import causes, total
from ssl_pipeline.data.prepared import ImageFiles, PreparedConfig, scan_folder
from ssl_pipeline.data.source import Part, Split
from ssl_pipeline.data.split_folders import splits_in
from ssl_pipeline.data.splits import part_of, stratified_split
from ssl_pipeline.data.verdicts import listed

_log = logging.getLogger("ssl_pipeline")


class Config(PreparedConfig[FileDataset | None]):
    """A folder of your own.

    If images lie in the folder itself, it is flat: all images in it and below are taken, without labels. If they all lie in
    subfolders, each of them is a class; a single one is no class, and its images are taken without labels. If the folder
    holds ``train`` and ``test``, these are the splits, and so is ``val``, as ``dev``; without ``test``, ``val`` is the test.
    Splits may have any of their usual names (:data:`~ssl_pipeline.data.splits.SPLIT_NAMES`), capitals aside.

    Attributes:
        path: the folder. Nothing in it is changed.
        test_path: another folder, of the same classes, to measure on.
        dev: the share of labeled training images that is held out for choices.
        test: the share that is held out for the final figures where there is no test folder.
    """

    path: str
    test_path: str | None = None
    dev: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)

    def open_part(self, part: Part) -> FileDataset | None:
        """A split, or all images but those of the test, be it a folder or a share; ``dev`` and ``test`` need labels.

        Raises:
            ConfigError: a folder is missing, empty, holds unreadable files, or its classes do not fit.
        """
        folders, base = self.folders(), self.base
        train = _scan(folders["train"], "data.path", self.bad_files, base)
        if train.classes is None:
            return train.source(self) if part in ("train", "pool") else None
        if part != "train" and part != "pool" and part in folders:
            return self._own(part, folders[part]).relabeled(train.classes).source(self)
        test, dev = (None if name in folders else share for name, share in (("test", self.test), ("dev", self.dev)))
        return part_of(train.source(self), _held_out(folders["train"], self.bad_files, base, test, dev), part)

    def open_parts(self) -> dict[Split, IndexedDataset]:
        """All images by their splits; folders without classes have those alone that are folders."""
        folders = self.folders()
        if _scan(folders["train"], "data.path", self.bad_files, self.base).classes is not None:
            return super().open_parts()
        return {split: self._own(split, place).source(self) for split, place in folders.items()}

    def _own(self, split: Split, place: Path) -> _Scan:
        key = "data.test_path" if split == "test" and self.test_path else "data.path"
        return _scan(place, key, self.bad_files, self.base)

    def folders(self) -> dict[Split, Path]:
        """The folders that splits have of their own."""
        root = existing_folder(self.path, "data.path")
        folders = {split: root / name for split, name in splits_in(root).items()} or {"train": root}
        if "test" not in folders and "dev" in folders:
            folders["test"] = folders.pop("dev")
        if self.test_path is not None:
            folders["test"] = existing_folder(self.test_path, "data.test_path")
            if folders["test"].is_relative_to(folders["train"]):
                raise ConfigError(
                    f"`data.test_path`: {self.test_path!r} lies in the training folder {str(folders['train'])!r}, so its images "
                    "would be trained on: move it out."
                )
        return folders


def existing_folder(given: str, key: str) -> Path:
    """A folder of the user's, resolved, so that what is cached for it outlives a change of the working directory.

    Raises:
        ConfigError: there is none.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        what = "is a file, and a folder is needed" if path.exists() else "does not exist"
        raise ConfigError(f"`{key}`: {given!r} {what}: give the folder that holds the images.")
    return path.resolve()


@dataclass(frozen=True)
class _Scan:
    """What a folder holds that can be used.

    Attributes:
        images: its files.
        tops: per folder the subfolder of the root it lies in, "" for the root itself.
        classes: the names of its subfolders, sorted; None without labels.
        labels: per file the number of its class, int64 of shape (N,); None without.
        unlabeled_because: see :class:`~ssl_pipeline.data.source.IndexedDataset`.
    """

    images: ImageFiles
    tops: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    labels: Tensor | None = None
    unlabeled_because: str | None = None

    def source(self, config: Config) -> FileDataset:
        """As a source.

        Raises:
            ConfigError: the cache is wanted, and there is none.
        """
        source = self.images.source(config, str(self.images.root), labels=self.labels, classes=self.classes)
        source.unlabeled_because = self.unlabeled_because
        return source

    def relabeled(self, classes: tuple[str, ...]) -> _Scan:
        root = str(self.images.root)
        if "" in self.used():
            raise ConfigError(
                f"{root!r} has no class folders for some of its images, such as {self._outside()[1]!r}; it needs those of "
                f"training: {listed(classes)}."
            )
        unknown = sorted(self.used() - set(classes))
        if unknown:
            raise ConfigError(
                f"{root!r} has classes that training has not: {listed(unknown)}; it may only have those of the "
                f"training folder: {listed(classes)}. Rename or remove the folders."
            )
        return replace(self, classes=classes, labels=self.numbered(classes))

    def _folders(self) -> Tensor:
        folders = self.images.files.column("folder")
        assert folders is not None
        return folders.long()

    def used(self) -> set[str]:
        """The subfolders of the root that hold images."""
        return {self.tops[folder] for folder in self._folders().unique().tolist()}

    def _outside(self) -> tuple[int, str]:
        """How many images lie in the root itself, and one of them."""
        places = torch.tensor([top == "" for top in self.tops])[self._folders()].nonzero()[:, 0]
        return len(places), self.images.files[int(places[0])]

    def without_labels(self) -> _Scan:
        """The same files, with the reason why their folders are no classes."""
        root, used = str(self.images.root), self.used()
        if used == {""}:
            reason = f"all images lie in {root!r} itself: put them into one folder per class."
        elif "" in used:
            count, file = self._outside()
            reason = (
                f"{count} of {len(self.images.files)} images lie beside the folders in {root!r}, such as {file!r}, and so the "
                "folders are no classes: move these images into a class's folder, or out."
            )
        else:
            (top,) = used
            numbers = set(self._folders().tolist())
            below = {path.split("/")[1] for i, path in enumerate(self.images.folders) if i in numbers and "/" in path}
            reason = f"all images lie in the one folder {top!r} of {root!r}, and one class is nothing to tell apart: "
            if len(below) > 1:
                reason += f"{listed(sorted(below))} in it may be the classes, so give data.path={root}/{top}"
            else:
                reason += "give the folder that holds one folder per class."
        return replace(self, unlabeled_because=reason)

    def numbered(self, classes: tuple[str, ...]) -> Tensor:
        """Per file the number of its subfolder."""
        number = {name: place for place, name in enumerate(classes)}
        return torch.tensor([number.get(top, -1) for top in self.tops])[self._folders()]


@lru_cache(maxsize=8)
def _scan(root: Path, key: str, limit: BadFilesLimit, base: Path | None) -> _Scan:
    """Reads a folder once in the process's life; ``key`` is what messages call it."""
    images = scan_folder(root, base, limit)
    if len(images.files) < 2:
        what = "no image" if not images.files else f"only one image ({images.files[0]})"
        why = causes(images.others, images.relative_faults)
        raise ConfigError(
            f"`{key}`: {str(root)!r} holds {what}, and at least two are needed"
            f"{': of its files ' + '; '.join(why) if why else ' (hidden files do not count)'}. What Pillow reads is read: .jpg, "
            ".jpeg, .png, .tif, .webp, .avif and others."
        )
    if images.others:
        count, example = total(images.others)
        _log.info("ignored %d other files in %s, such as %s", count, root, example)
    images.refuse_lost_folders(levels=1)
    scan = _Scan(images, tuple("" if folder == "." else as_text(folder.split("/")[0]) for folder in images.folders))
    classes = tuple(sorted(scan.used()))
    if "" in classes or len(classes) == 1:
        return scan.without_labels()
    return replace(scan, classes=classes, labels=scan.numbered(classes))


@lru_cache(maxsize=8)
def _held_out(
    root: Path, limit: BadFilesLimit, base: Path | None, test: float | None, dev: float | None
) -> dict[Part, Tensor]:
    """Per split its samples of the training folder; the share is None where a split has a folder of its own."""
    labels = _scan(root, "data.path", limit, base).labels
    assert labels is not None
    index: dict[Part, Tensor] = {"train": torch.arange(len(labels))}
    shares: tuple[tuple[Part, float | None], ...] = (("test", test), ("dev", dev))
    for split, share in shares:
        if split == "dev":
            index["pool"] = index["train"]
        if share is not None:
            pool = index["train"]
            rest, held_out = stratified_split(labels[pool], max(1, round(share * len(pool))), "folder", split)
            index["train"], index[split] = pool[rest], pool[held_out]
    return index
