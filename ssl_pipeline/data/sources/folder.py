"""A folder of image files: flat and without labels, or one folder per class."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.bad_files import BadFilesLimit
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.image_files import FileDataset, ImageFiles, PreparedConfig, scan_folder
from ssl_pipeline.data.image_index import as_text, causes
from ssl_pipeline.data.source import Part, Split
from ssl_pipeline.data.splits import part_of, split_three, splits_in

_log = logging.getLogger("ssl_pipeline")


class Config(PreparedConfig[FileDataset | None]):
    """A folder of your own.

    If images lie in the folder itself, it is flat: all images in it and below are taken, without labels. If they all lie in
    subfolders, each of them is a class; a single one is no class, and its images are taken without labels. If the folder
    holds ``train`` and ``test``, these are the splits, and so is ``val``, as ``val``; without ``test``, ``val`` is the test.
    Splits may have any of their usual names (:data:`~ssl_pipeline.data.splits.SPLIT_NAMES`), capitals aside.

    Attributes:
        path: the folder. Nothing in it is changed.
        test_path: another folder, of the same classes, to measure on.
        val: the share of labeled training images that is held out for choices.
        test: the share that is held out for the final figures where there is no test folder.
    """

    path: str
    test_path: str | None = None
    val: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)

    def open_part(self, part: Part) -> FileDataset | None:
        """A split, or all images but those of the test, be it a folder or a share; ``val`` and ``test`` need labels.

        Raises:
            ConfigError: a folder is missing, empty, holds unreadable files, or its classes do not fit.
        """
        folders = self.folders()
        train = self._scan("train", folders["train"])
        if train.classes is None:
            return train.dataset(self) if part in ("train", "pool") else None
        assert train.labels is not None
        if part != "train" and part != "pool" and part in folders:
            return self._scan(part, folders[part]).relabeled(train.classes).dataset(self)
        test, val = (None if name in folders else share for name, share in (("test", self.test), ("val", self.val)))
        return part_of(train.dataset(self), split_three(train.labels, test, val, "folder"), part)

    def open_parts(self) -> dict[Split, IndexedDataset]:
        """All images by their splits; without classes only folders are splits."""
        folders = self.folders()
        if self._scan("train", folders["train"]).classes is not None:
            return super().open_parts()
        return {split: self._scan(split, place).dataset(self) for split, place in folders.items()}

    def _scan(self, split: Split, place: Path) -> _ClassFolders:
        key = "data.test_path" if split == "test" and self.test_path else "data.path"
        return _scan(place, key, self.max_bad_files, self.base)

    def folders(self) -> dict[Split, Path]:
        """The splits that have folders of their own."""
        root = existing_folder(self.path, "data.path")
        folders = {split: root / name for split, name in splits_in(root).items()} or {"train": root}
        if "test" not in folders and "val" in folders:
            folders["test"] = folders.pop("val")
        if self.test_path is not None:
            folders["test"] = existing_folder(self.test_path, "data.test_path")
            if folders["test"].is_relative_to(folders["train"]):
                raise ConfigError(
                    f"`data.test_path`: {self.test_path!r} lies in the training folder {str(folders['train'])!r}, so its images "
                    "would be trained on: move it out."
                )
        return folders


@dataclass(frozen=True)
class _ClassFolders:
    """A folder's images.

    Attributes:
        images: its files.
        tops: per file the subfolder of the root it lies in, "" for the root itself, as a number of ``names``.
        names: of the subfolders that hold images, sorted; "" for the root itself.
        classes: the names, where they are classes.
    """

    images: ImageFiles
    tops: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    labels: Tensor | None = None
    unlabeled_because: str | None = None

    def dataset(self, config: Config) -> FileDataset:
        """The images as a dataset."""
        source = self.images.dataset(config, str(self.images.root), labels=self.labels, classes=self.classes)
        source.unlabeled_because = self.unlabeled_because
        return source

    def relabeled(self, classes: tuple[str, ...]) -> _ClassFolders:
        """The same files with the numbers of training's classes."""
        root = str(self.images.root)
        if "" in self.names:
            raise ConfigError(
                f"{root!r} has no class folders for some of its images, such as {self._outside()[0]!r}; it needs those of "
                f"training: {joined(classes)}."
            )
        unknown = sorted(set(self.names) - set(classes))
        if unknown:
            raise ConfigError(
                f"{root!r} has classes that training has not: {joined(unknown)}; it may only have those of the "
                f"training folder: {joined(classes)}. Rename or remove the folders."
            )
        numbers = torch.tensor([classes.index(name) for name in self.names])
        return replace(self, classes=classes, labels=numbers[self.tops])

    def _outside(self) -> list[str]:
        """The images that lie in the root itself."""
        return list(self.images.files.select(self.tops == self.names.index("")))

    def with_labels(self) -> _ClassFolders:
        """The subfolders as classes; or the reason why they are none."""
        root, names = str(self.images.root), self.names
        if len(names) > 1 and "" not in names:
            return replace(self, classes=names, labels=self.tops)
        if names == ("",):
            reason = f"all images lie in {root!r} itself: put them into one folder per class."
        elif "" in names:
            outside = self._outside()
            reason = (
                f"{len(outside)} of {len(self.images.files)} images lie beside the folders in {root!r}, such as {outside[0]!r}, "
                "and so the folders are no classes: move these images into a class's folder, or out."
            )
        else:
            below = sorted({parts[1] for file in self.images.files if len(parts := file.split("/")) > 2})
            reason = (
                f"all images lie in the one folder {names[0]!r} of {root!r}, and one class is nothing to tell apart: "
            )
            if len(below) > 1:
                reason += f"{joined(below)} in it may be the classes, so give data.path={root}/{names[0]}"
            else:
                reason += "give the folder that holds one folder per class."
        return replace(self, unlabeled_because=reason)


@lru_cache(maxsize=8)
def _scan(root: Path, key: str, limit: BadFilesLimit, base: Path | None) -> _ClassFolders:
    """Reads a folder once in the process's life; ``key`` is what messages call it."""
    images = scan_folder(root, base, limit)
    assert images.index is not None
    ignored = images.index.ignored
    if len(images.files) < 2:
        what = "no image" if not images.files else f"only one image ({images.files[0]})"
        why = causes(ignored, images.faults)
        raise ConfigError(
            f"`{key}`: {str(root)!r} holds {what}, and at least two are needed"
            f"{': of its files ' + '; '.join(why) if why else ' (hidden files do not count)'}. What Pillow reads is read: .jpg, "
            ".jpeg, .png, .tif, .webp, .avif and others."
        )
    if ignored:
        count, example = sum(one.count for one in ignored), min(one.example for one in ignored)
        _log.info("ignored %d other files in %s, such as %s", count, root, example)
    images.refuse_lost_folders(levels=1)
    names, tops = images.by_folder(lambda folder: "" if folder == "." else as_text(folder.split("/")[0]))
    return _ClassFolders(images, tops, names).with_labels()
