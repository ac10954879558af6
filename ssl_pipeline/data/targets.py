"""Targets of images with more than one class each: numbers, a mask, or boxes beside every image.

A view is a pure function of the draws' names, so a target need not travel through the loader with its image: the box and the
mirror of a view are drawn again, by the same names, and applied to the target.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.transforms.multi_view import Views

IGNORE = 255  # a pixel that belongs to no class: nothing is learned from it, and nothing is measured on it


class Annotations(ABC):
    """One annotation per sample of a source.

    Attributes:
        names: of the classes or values that a model has an output for, in their order.
    """

    names: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def select(self, index: Tensor) -> Annotations:
        """The annotations of an int64 index of samples."""

    @abstractmethod
    def digest(self) -> bytes:
        """Changes when the annotations do."""

    @abstractmethod
    def of_views(self, index: Tensor, views: Views, epoch: int) -> Any:
        """The annotations of the samples' first views, as ``Batch.target`` has them, on the CPU.

        Args:
            index: int64 of shape (B,).
            views: which crops and mirrors the images get.
            epoch: the epoch.
        """

    @abstractmethod
    def whole(self, index: int) -> Any:
        """One sample's annotation in its image's own pixels."""


@dataclass(eq=False)
class NumericTargets(Annotations):
    """Numbers beside every image: several labels of 0 and 1, or values to predict.

    Attributes:
        values: float32 of shape (N, K); NaN where a value is not known.
        names: of the K columns.
    """

    values: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: Tensor) -> NumericTargets:
        return replace(self, values=self.values[index])

    def digest(self) -> bytes:
        return hashlib.blake2b(self.values.numpy().tobytes(), digest_size=16).digest()

    def of_views(self, index: Tensor, views: Views, epoch: int) -> Tensor:
        """(B, K); a crop does not change them."""
        del views, epoch
        return self.values[index]

    def whole(self, index: int) -> Tensor:
        return self.values[index]


@dataclass(eq=False)
class Masks(Annotations):
    """A mask per image, read when it is wanted.

    Attributes:
        files: the masks' paths.
        sizes: heights and widths of the images, int64 of shape (N, 2).
        counts: pixels of each class, int64 of shape (N, K).
        names: of the classes.
        values: the numbers that stand for the classes in the files, in the order of the names; None for 0, 1, 2, ….
    """

    files: Sequence[Path]
    sizes: Tensor
    counts: Tensor
    names: tuple[str, ...]
    values: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._classes = None if self.values is None else np.full(256, IGNORE, np.uint8)
        if self._classes is not None:
            self._classes[list(self.values or ())] = range(len(self.values or ()))

    def __len__(self) -> int:
        return len(self.files)

    def select(self, index: Tensor) -> Masks:
        files = [self.files[i] for i in index.tolist()]
        return replace(self, files=files, sizes=self.sizes[index], counts=self.counts[index])

    def digest(self) -> bytes:
        """Of names, sizes, and how many pixels each class has in each mask."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\0".join(file.name for file in self.files).encode(errors="surrogateescape"))
        digest.update(self.sizes.numpy().tobytes() + self.counts.numpy().tobytes())
        digest.update(bytes(self.values or ()))
        return digest.digest()

    def of_views(self, index: Tensor, views: Views, epoch: int) -> Tensor:
        """The classes of the first views' pixels, int64 of shape (B, S, S); by the nearest pixel, classes have no mean."""
        _, boxes, mirrored = next(views.boxes(index, epoch, *self.sizes[index].unbind(1)))
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


class Boxes(Annotations):
    """Any number of boxes per image.

    Args:
        boxes: per image float32 of shape (n, 4): left, top, right, bottom in its pixels, all of them inside it.
        labels: per image their classes, int64 of shape (n,).
        sizes: heights and widths of the images, int64 of shape (N, 2).
        names: of the classes.
        crowds: per image the boxes and the classes, as above, of regions that hold too many objects to be told apart. Nothing is
            learned from them, and what is found in them is neither right nor wrong; none by default.
    """

    def __init__(
        self,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Tensor,
        names: tuple[str, ...],
        crowds: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.boxes, self.labels, self.sizes, self.names = list(boxes), list(labels), sizes, names
        none = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
        self.crowds = [none] * len(self.boxes) if crowds is None else list(crowds)

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: Tensor) -> Boxes:
        chosen = index.tolist()
        boxes, labels, crowds = ([side[i] for i in chosen] for side in (self.boxes, self.labels, self.crowds))
        return Boxes(boxes, labels, self.sizes[index], self.names, crowds)

    def digest(self) -> bytes:
        digest = hashlib.blake2b(self.sizes.numpy().tobytes(), digest_size=16)
        for boxes, labels in zip(self.boxes, self.labels, strict=True):
            digest.update(len(boxes).to_bytes(4) + boxes.numpy().tobytes() + labels.numpy().tobytes())
        for boxes, labels in self.crowds:
            digest.update(boxes.numpy().tobytes() + labels.numpy().tobytes())
        return digest.digest()

    def counts(self) -> Tensor:
        """Boxes of each class, crowds aside, int64 of shape (K,)."""
        return torch.cat([*self.labels, torch.empty(0, dtype=torch.int64)]).bincount(minlength=len(self.names))

    def of_views(self, index: Tensor, views: Views, epoch: int) -> list[dict[str, Tensor]]:
        """The boxes in the first views, per sample ``boxes`` (n, 4) in the view's pixels and ``labels`` (n,).

        A box whose center lies outside of the crop is dropped (Liu et al. 2016); one that reaches out of it is cut off.
        """
        _, crops, mirrored = next(views.boxes(index, epoch, *self.sizes[index].unbind(1)))
        size, targets = views.config.size, []
        for i, crop, mirror in zip(index.tolist(), crops.float(), mirrored.tolist(), strict=True):
            (top, left, height, width), boxes = crop.unbind(), self.boxes[i]
            scale = size / torch.stack([width, height, width, height])
            boxes = (boxes - torch.stack([left, top, left, top])) * scale
            if mirror:
                boxes = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
            center = (boxes[:, :2] + boxes[:, 2:]) / 2
            boxes, inside = boxes.clamp(0, size), ((center > 0) & (center < size)).all(1)
            kept = inside & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)  # less than a pixel is nothing to look at
            targets.append({"boxes": boxes[kept], "labels": self.labels[i][kept]})
        return targets

    def whole(self, index: int) -> dict[str, Tensor]:
        """One image's ``boxes`` and ``labels``, crowds last, which of them are crowds (``iscrowd``), and its ``size``: height and width."""
        crowd_boxes, crowd_labels = self.crowds[index]
        return {
            "boxes": torch.cat([self.boxes[index], crowd_boxes]),
            "labels": torch.cat([self.labels[index], crowd_labels]),
            "iscrowd": torch.arange(len(self.boxes[index]) + len(crowd_boxes)).ge(len(self.boxes[index])).long(),
            "size": self.sizes[index],
        }
