"""The batches of annotated images, and whole images for tasks that predict a value for every pixel or box."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import IndexedLoader, Preprocessing, open_readable
from ssl_pipeline.data.targets import AnnotatedDataset
from ssl_pipeline.transforms.geometry import as_float, resize_box_of_file, resize_boxes, stack_views


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
