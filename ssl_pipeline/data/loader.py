"""From a source to batches: training's are a pure function of the step, evaluation's read everything once, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.order import samples_of_step
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.schedules import Clock
from ssl_pipeline.views.geometry import central_boxes, resize_box_of_file, resize_boxes
from ssl_pipeline.views.policy import Views


@dataclass(frozen=True)
class Share:
    """This process's share of the work, and the device it is done on."""

    rank: int
    processes: int
    device: torch.device


class _Crops(Dataset[tuple[Tensor, list[Tensor]] | DecodeError]):
    """Decoded and cropped files, a whole step per item, so that a worker draws a batch's geometry at once.

    A file that can't be decoded is returned rather than raised: the loader would wrap it in a traceback.
    """

    def __init__(self, batches: StepBatches) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> tuple[Tensor, list[Tensor]] | DecodeError:
        batches = self._batches
        index = batches.samples(step)
        try:
            images = [batches.source.open_image(int(i)) for i in index]
        except DecodeError as error:
            return error
        return index, batches.views.of_files(images, index, batches.clock(step).epoch)


class StepBatches:
    """The training batches of a run.

    Args:
        source: numbered samples.
        views: the random views.
        batch_size: samples of a step over all processes.
        seed: the run's seed.
        share: this process's share.
        total_steps: the run's length.
        workers: processes that decode files; in-memory sources need none. None settles it by the machine.
        with_labels: whether batches carry labels; stage one's don't, except for tasks that say so.
    """

    def __init__(
        self,
        source: Indexed,
        views: Views,
        batch_size: int,
        seed: int,
        share: Share,
        total_steps: int,
        workers: int | None = None,
        with_labels: bool = False,
    ) -> None:
        self.source, self.views, self.share = source, views, share
        self.batch_size, self.seed, self.total_steps = batch_size, seed, total_steps
        self.steps_per_epoch = len(source) // batch_size
        self._labels = source.labels if with_labels else None
        self._pixels = source.pixels
        cores = len(os.sched_getaffinity(0))
        self.workers = max(1, min(8, cores // share.processes)) if workers is None else workers

    def clock(self, step: int) -> Clock:
        """The clock of a step."""
        return Clock(step, self.total_steps, self.steps_per_epoch)

    def samples(self, step: int) -> Tensor:
        """This process's samples of a step, int64 of shape (B,)."""
        clock, share = self.clock(step), self.share
        return samples_of_step(clock, len(self.source), self.batch_size, self.seed, share.rank, share.processes)

    def from_step(self, start: int) -> Iterator[Batch]:
        """The batches from a step to the run's end; a resume is nothing but another start."""
        crops = self._crops_of_pixels(start) if self._pixels is not None else self._crops_of_files(start)
        for step, (index, views) in enumerate(crops, start):
            clock = self.clock(step)
            finished = self.views.finish(views, index, clock.epoch)
            label = None if self._labels is None else self._labels[index].to(self.share.device)
            yield Batch(clock, index.to(self.share.device), finished, label)

    def _crops_of_pixels(self, start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        assert self._pixels is not None
        for step in range(start, self.total_steps):
            index = self.samples(step)
            pixels = self._pixels[index].to(self.share.device, non_blocking=True)
            yield index, self.views.of_pixels(pixels, index, self.clock(step).epoch)

    def _crops_of_files(self, start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        options: dict[str, Any] = {"prefetch_factor": 2} if self.workers else {}
        loader = DataLoader(
            _Crops(self),
            batch_size=None,
            sampler=range(start, self.total_steps),
            num_workers=self.workers,
            pin_memory=self.share.device.type == "cuda",
            **options,
        )
        for item in loader:
            if isinstance(item, DecodeError):
                raise item
            index, crops = item
            yield index, [crop.to(self.share.device, non_blocking=True) for crop in crops]


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation and prediction do to an image: the central square, resized, normalised."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values)[None, :, None, None] for values in (self.mean, self.std))
        return images.sub(mean).div_(std)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to normalised float32 (B, C, size, size), on the pixels' device."""
        heights, widths = (torch.full((len(pixels),), side) for side in pixels.shape[2:])
        return self._normalise(resize_boxes(pixels, central_boxes(heights, widths), self.size))

    def of_files(self, images: list[Image.Image]) -> Tensor:
        """Decoded files to normalised float32 (B, C, size, size)."""
        boxes = central_boxes(torch.tensor([i.height for i in images]), torch.tensor([i.width for i in images]))
        views = [resize_box_of_file(image, box, self.size) for image, box in zip(images, boxes, strict=True)]
        return self._normalise(torch.stack(views).float() / 255)


def read_in_order(
    source: Indexed, preprocessing: Preprocessing, device: torch.device, index: Tensor | None = None, chunk: int = 256
) -> Iterator[Tensor]:
    """Reads samples once, in order, without randomness.

    Args:
        source: numbered samples.
        preprocessing: the central square, resized and normalised.
        device: where the images are wanted.
        index: which samples, int64 of shape (N,); all by default.
        chunk: samples at a time.

    Yields:
        float32 of shape (≤ chunk, C, size, size).
    """
    index = torch.arange(len(source)) if index is None else index
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in index.split(chunk):
            if source.pixels is not None:
                yield preprocessing.of_pixels(source.pixels[part].to(device))
            else:
                images = list(pool.map(source.open_image, part.tolist()))
                yield preprocessing.of_files(images).to(device)
