"""A folder of image files: flat and without labels, or one folder per class."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.bad_files import BadFilesLimit
from ssl_pipeline.data.image_files import FileDataset, ImageFiles, PreparedConfig, scan_folder
from ssl_pipeline.data.image_index import as_text, causes
from ssl_pipeline.data.source import Images
from ssl_pipeline.data.splits import Split, splits_in

_log = logging.getLogger("ssl_pipeline")


class Config(PreparedConfig):
    """A folder of your own.

    If images lie in the folder itself, it is flat: all images in it and below are taken, without labels. If they all lie in
    subfolders, each of them is a class; a single one is no class, and its images are taken without labels. If the folder
    holds ``train`` and ``test``, these are the splits, and so is ``val``, as ``val``; without ``test``, ``val`` is the test.
    Splits may have any of their usual names (:data:`~ssl_pipeline.data.splits.SPLIT_NAMES`), capitals aside.

    Attributes:
        path: the folder. Nothing in it is changed.
        test_path: another folder, of the same classes, to measure on.
    """

    path: str
    test_path: str | None = None

    def read_images(self) -> Images:
        folders = self.folders()
        train = self._scan("train", folders.pop("train"))
        own = {split: partial(self._open_own, split, place, train.classes) for split, place in folders.items()}
        images = train.dataset(self, train.classes)
        return Images(images, images.labels, own)

    def _open_own(self, split: Split, place: Path, classes: tuple[str, ...] | None) -> FileDataset:
        found = self._scan(split, place)
        return found.dataset(self, classes or found.classes)

    def _scan(self, split: Split, place: Path) -> _ClassFolders:
        key = "data.test_path" if split == "test" and self.test_path else "data.path"
        return _scan(place, key, self.max_bad_files, self.base)

    def folders(self) -> dict[Split, Path]:
        """The splits that have folders of their own."""
        root = existing_folder(self.path, "data.path")
        folders = {split: root / name for split, name in splits_in(root).items()} or {"train": root}
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
        tops: per file the subfolder of the root it lies in, as a number of ``names``.
        names: of the subfolders that hold images, sorted; "" for the root itself.
    """

    images: ImageFiles
    tops: Tensor
    names: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The subfolders' names, where they are classes."""
        return self.names if len(self.names) > 1 and "" not in self.names else None

    def dataset(self, config: Config, classes: tuple[str, ...] | None) -> FileDataset:
        """The images as a dataset, with the numbers of some classes, its own or training's."""
        root = str(self.images.root)
        if classes is None:
            source = self.images.dataset(config, root)
            source.unlabeled_because = self._why_unlabeled()
            return source
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
        return self.images.dataset(config, root, labels=numbers[self.tops], classes=classes)

    def _outside(self) -> list[str]:
        """The images that lie in the root itself."""
        return list(self.images.files.select(self.tops == self.names.index("")))

    def _why_unlabeled(self) -> str:
        """Why the subfolders are no classes, and what to do."""
        root = str(self.images.root)
        if self.names == ("",):
            return f"all images lie in {root!r} itself: put them into one folder per class."
        if "" in self.names:
            outside = self._outside()
            return (
                f"{len(outside)} of {len(self.images.files)} images lie beside the folders in {root!r}, such as {outside[0]!r}, "
                "and so the folders are no classes: move these images into a class's folder, or out."
            )
        (name,) = self.names
        below = sorted({parts[1] for file in self.images.files if len(parts := file.split("/")) > 2})
        mend = "give the folder that holds one folder per class."
        if len(below) > 1:
            mend = f"{joined(below)} in it may be the classes, so give data.path={root}/{name}"
        return f"all images lie in the one folder {name!r} of {root!r}, and one class is nothing to tell apart: {mend}"


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
    return _ClassFolders(images, tops, names)
