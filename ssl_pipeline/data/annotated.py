"""Images with more than one class each: numbers, a mask, or boxes beside every image, and the batches that carry them.

A view is a pure function of the draws' names, so an annotation need not travel through the loader with its image: the box
and the mirror of a view are drawn again, by the same names, and applied to the annotation.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import IndexedLoader, Preprocessing, open_readable
from ssl_pipeline.data.value_range import Range
from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms.geometry import as_float, crop_boxes, resize_box_of_file, resize_boxes, stack_views
from ssl_pipeline.transforms.policy import Views

Kind = TypeVar("Kind", bound="Annotations")


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


class NumericTargets(Annotations):
    """Numbers beside every image: several labels of 0 and 1, or values to predict.

    Args:
        values: float32 of shape (N, K); NaN where a value is not known.
        names: of the K columns.
    """

    def __init__(self, values: Tensor, names: tuple[str, ...]) -> None:
        self.values, self.names = values, names

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: Tensor) -> NumericTargets:
        return NumericTargets(self.values[index], self.names)

    def digest(self) -> bytes:
        return hashlib.blake2b(self.values.numpy().tobytes(), digest_size=16).digest()

    def of_views(self, index: Tensor, views: Views, epoch: int) -> Tensor:
        """(B, K); a crop does not change them."""
        del views, epoch
        return self.values[index]

    def whole(self, index: int) -> Tensor:
        return self.values[index]


class AnnotatedDataset(IndexedDataset):
    """A source's images with annotations beside them. It has no labels, so stage one reads it like any images."""

    def __init__(self, images: IndexedDataset, annotations: Annotations) -> None:
        assert len(images) == len(annotations)
        self.images, self.annotations, self.classes = images, annotations, annotations.names
        for name in ("name", "channels", "pixels", "license", "mean", "std", "bad_files", "value_range"):
            setattr(self, name, getattr(images, name))

    def __len__(self) -> int:
        return len(self.images)

    def open_image(self, index: int) -> Image.Image:
        return self.images.open_image(index)

    def stored_values(self) -> Mapping[str, np.ndarray]:
        return self.images.stored_values()

    def at_range(self, value_range: Range | None) -> Self:
        source = super().at_range(value_range)
        source.images = self.images.at_range(value_range)
        return source

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.images.sizes(index)

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        return self.images.open_reduced(index, factor)

    def describe(self, index: int) -> str:
        return self.images.describe(index)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.images.fingerprint().encode(), digest_size=16)
        digest.update(self.annotations.digest())
        return digest.hexdigest()

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen.images, chosen.annotations = self.images.select(index), self.annotations.select(index)
        chosen.pixels = chosen.images.pixels
        return chosen


def annotations_of(source: IndexedDataset, kind: type[Kind]) -> Kind | None:
    """A source's annotations of a kind; None if it has none of that kind."""
    if isinstance(source, AnnotatedDataset) and isinstance(source.annotations, kind):
        return source.annotations
    return None


class AnnotatedLoader(IndexedLoader):
    """The training batches of an annotated source; see :class:`IndexedLoader`."""

    def from_step(self, start: int) -> Iterator[Batch]:
        """The batches from a step to the run's end, each with its ``target``; masks are read a few steps ahead."""
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            coming = iter(range(start, self.total_steps))
            ahead = deque(pool.submit(self._target, step) for step in islice(coming, 4))
            for step, batch in enumerate(super().from_step(start), start):
                target = ahead.popleft().result()
                if self.replaced is not None:
                    target = self._target(step, self.replaced)
                batch.target = to_device(target, self.share.device)
                ahead.extend(pool.submit(self._target, step) for step in islice(coming, 1))
                yield batch

    def _target(self, step: int, index: Tensor | None = None) -> Any:
        """The annotations of a step's samples, or of those that have taken the place of some."""
        source = self.source
        assert isinstance(source, AnnotatedDataset)
        index = self.samples(step) if index is None else index
        return source.annotations.of_views(index, self.views, self.clock(step).epoch)


def to_device(target: Any, device: torch.device) -> Any:
    """A target on another device: a tensor, or lists and dictionaries of them."""
    if isinstance(target, Tensor):
        return target.to(device, non_blocking=True)
    if isinstance(target, dict):
        return {key: to_device(value, device) for key, value in target.items()}
    return [to_device(entry, device) for entry in target]


def place_of_views(index: Tensor, views: Views, epoch: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first views of samples come from: their crops and mirrors, drawn by the names that the images' have.

    Args:
        index: int64 of shape (B,).
        views: the views' policy and seed.
        epoch: the epoch.
        sizes: heights and widths of all images, int64 of shape (N, 2).

    Returns:
        int64 of shape (B, 4): top, left, height, width; and which are mirrored, bool of shape (B,).
    """
    draws = NamedRNG(index, views.seed, "views", epoch, 0)
    heights, widths = sizes[index].unbind(1)
    return crop_boxes(draws, heights, widths, views.config.crop), draws.happens("flip", views.config.flip)


def read_whole(
    source: IndexedDataset, preprocessing: Preprocessing, device: torch.device, index: Tensor, chunk: int = 16
) -> Iterator[tuple[list[int], Tensor]]:
    """Reads whole images, once and in order: a dense task must not lose what a central square would cut off.

    An image that can't be decoded is left out and counted, as :func:`ssl_pipeline.data.loader.read_readable` does.

    Args:
        source: numbered samples.
        preprocessing: size and normalization.
        device: where the images are wanted.
        index: which samples, int64 of shape (N,).
        chunk: samples at a time.

    Yields:
        The samples' numbers, and their images, resized to a square without regard to their shape and normalized: float32 of
        shape (≤ chunk, C, size, size).
    """
    size = preprocessing.size
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in index.split(chunk):
            if source.pixels is not None:
                pixels = source.pixels[part].to(device)
                box = torch.tensor([0, 0, *pixels.shape[2:]]).expand(len(part), -1)
                images = resize_boxes(pixels, box, size)
            else:
                opened = list(pool.map(lambda i: open_readable(source, i), part.tolist()))
                part = part[torch.tensor([image is not None for image in opened])]
                views = [whole_view(image, size) for image in opened if image is not None]
                if not views:
                    continue
                images = as_float(stack_views(views, len(preprocessing.mean)).to(device))
            yield part.tolist(), (images - mean) / std


def whole_view(image: Image.Image, size: int) -> Tensor:
    """A decoded image resized to a square, uint8 of shape (C, size, size), or float32 if it has more than 8 bits."""
    return resize_box_of_file(image, torch.tensor([0, 0, image.height, image.width]), size)
