"""Masks: the class of every pixel of an image, in an image file of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, shorten
from ssl_pipeline.data.annotated import Annotations, place_of_views
from ssl_pipeline.data.decode import check_header
from ssl_pipeline.transforms.policy import Views

IGNORE = 255  # a pixel that belongs to no class: nothing is learned from it, and nothing is measured on it
T = TypeVar("T")


class Masks(Annotations):
    """A mask per image, read when it is wanted.

    Args:
        files: the masks' paths.
        sizes: heights and widths of the images, int64 of shape (N, 2).
        counts: pixels of each class, int64 of shape (N, K).
        names: of the classes.
        values: the numbers that stand for the classes in the files, in the order of the names; None for 0, 1, 2, ….
    """

    def __init__(
        self,
        files: Sequence[Path],
        sizes: Tensor,
        counts: Tensor,
        names: tuple[str, ...],
        values: tuple[int, ...] | None = None,
    ) -> None:
        self.files, self.sizes, self.counts, self.names, self.values = list(files), sizes, counts, names, values
        self._classes = None if values is None else np.full(256, IGNORE, np.uint8)
        if self._classes is not None:
            self._classes[list(values or ())] = range(len(values or ()))

    def __len__(self) -> int:
        return len(self.files)

    def select(self, index: Tensor) -> Masks:
        files = [self.files[i] for i in index.tolist()]
        return Masks(files, self.sizes[index], self.counts[index], self.names, self.values)

    def digest(self) -> bytes:
        """Of names, sizes, and how many pixels each class has in each mask."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\0".join(file.name for file in self.files).encode(errors="surrogateescape"))
        digest.update(self.sizes.numpy().tobytes() + self.counts.numpy().tobytes())
        digest.update(bytes(self.values or ()))
        return digest.digest()

    def of_views(self, index: Tensor, views: Views, epoch: int) -> Tensor:
        """The classes of the first views' pixels, int64 of shape (B, S, S); by the nearest pixel, classes have no mean."""
        boxes, mirrored = place_of_views(index, views, epoch, self.sizes)
        places = zip(index.tolist(), boxes.tolist(), mirrored.tolist(), strict=True)
        masks = [_view_of(self._read(i), box, mirror, views.config.size) for i, box, mirror in places]
        return torch.stack(masks)

    def whole(self, index: int) -> Tensor:
        """One image's classes, int64 of shape (H, W)."""
        return torch.from_numpy(np.array(self._read(index))).long()

    def _read(self, index: int) -> Image.Image:
        """A mask that holds the classes' numbers."""
        mask = read_mask(self.files[index])
        return mask if self._classes is None else Image.fromarray(self._classes[np.asarray(mask)])


def read_mask(path: Path) -> Image.Image:
    """A mask as an image of mode ``L`` that holds the file's numbers.

    Raises:
        ConfigError: it can't be read, or holds colors.
    """
    try:
        with Image.open(path) as file:
            file.load()
            mode = file.mode
            if mode in ("L", "P"):  # a palette's colors are for people; its indices are the classes
                return Image.fromarray(np.asarray(file))
            if mode == "1":
                return Image.fromarray(np.asarray(file).astype(np.uint8))
            if mode.startswith("I") and np.asarray(file).max() <= IGNORE:
                return Image.fromarray(np.asarray(file).astype(np.uint8))
    except MemoryError:
        raise
    except Exception as error:  # decoders answer damaged bytes with nearly any error
        raise ConfigError(f"{path} can't be read as a mask ({error}): write it anew.") from error
    raise ConfigError(
        f"{path} is a mask of mode {mode}, and a mask has one channel with the classes' numbers from 0 to 254 ({IGNORE}: no "
        "class): save it as a grayscale or palette PNG."
    )


def _view_of(mask: Image.Image, box: list[int], mirrored: bool, size: int) -> Tensor:
    top, left, height, width = box
    view = mask.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(ImageOps.mirror(view) if mirrored else view)).long()


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file after EXIF rotation, by its header.

    Raises:
        ConfigError: it is no image.
    """
    header = check_header(path)
    if isinstance(header, str):
        raise ConfigError(f"{path} can't be read as an image: {header}. Remove or replace the file.")
    return header.height, header.width


def for_all(paths: Sequence[Path], read: Callable[[Path], T]) -> list[T]:
    """Reads many files at once, and reports all mistakes together.

    Raises:
        ConfigError: naming the first of the files with a mistake.
    """

    def careful(path: Path) -> T | ConfigError:
        try:
            return read(path)
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(careful, paths))
    raise_all([problem for one in found if isinstance(one, ConfigError) for problem in one.problems])
    return [one for one in found if not isinstance(one, ConfigError)]


def raise_all(problems: Sequence[str]) -> None:
    """Raises a ConfigError with the first of the problems, if there are any."""
    if problems:
        raise ConfigError(shorten(problems))
