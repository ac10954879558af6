"""From a source to batches: training's are a pure function of the step, evaluation's read everything once, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_pipeline.config.base import UserError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.crops import NEIGHBORS, Crops, read_crops
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.order import samples_of_step, step_at
from ssl_pipeline.data.workers import read_items
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class DistInfo:
    """This process's share of the work, and the device it is done on."""

    rank: int
    processes: int
    device: torch.device


class _Steps(Dataset[Crops | UserError]):
    """A whole step per item, so that a worker draws a batch's geometry at once.

    An error is returned rather than raised: the loader would wrap it in a traceback.
    """

    def __init__(self, batches: IndexedLoader) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> Crops | UserError:
        batches = self._batches
        try:
            return read_crops(batches.source, batches.views, batches.samples(step), batches.clock(step).epoch)
        except UserError as error:
            return error


class IndexedLoader:
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

    Attributes:
        offset: optimizer steps that were taken beyond those of the clock; see :class:`ssl_pipeline.schedules.TrainProgress`.
        replaced: the samples of the batch that was given last, where neighbors have taken the place of some; None otherwise.
    """

    def __init__(
        self,
        source: IndexedDataset,
        views: Views,
        batch_size: int,
        seed: int,
        share: DistInfo,
        total_steps: int,
        workers: int | None = None,
        with_labels: bool = False,
    ) -> None:
        self.source, self.views, self.share = source, views, share
        self.batch_size, self.seed, self.total_steps = batch_size, seed, total_steps
        self.steps_per_epoch = len(source) // batch_size
        self._labels = source.labels if with_labels else None
        self._pixels = source.pixels
        self.workers = default_workers(share) if workers is None else workers
        self.replaced: Tensor | None = None
        self.offset, self._shifted = 0, (0, 0)  # an epoch, and the samples by which its steps begin later
        self._known_bad = len(self._faults)
        self._told = set(self._faults)

    def clock(self, step: int) -> TrainProgress:
        """The clock of a step."""
        return TrainProgress(step, self.total_steps, self.steps_per_epoch, self.offset)

    def position(self, step: int) -> dict[str, Any]:
        """How far the run has come before a step: the epoch, and how many of its samples were given to all processes."""
        epoch = self.clock(step).epoch
        return {"epoch": epoch, "samples": step % self.steps_per_epoch * self.batch_size + self._shift(epoch)}

    def go_on(self, position: Mapping[str, Any], taken: int, in_steps: bool) -> int:
        """Continues a run in the middle of an epoch, whatever its batch size was: no image is left out or given twice.

        Args:
            position: where it was, as :meth:`position` gives it.
            taken: the optimizer steps that it has taken.
            in_steps: whether its length is a number of optimizer steps, those that were taken among them.

        Returns:
            The step to go on from, as :meth:`from_step` counts; ``total_steps`` or more where nothing is left.
        """
        epoch, given = int(position["epoch"]), int(position["samples"])
        step = step_at(epoch, given, len(self.source), self.batch_size)
        self.offset = taken - step
        if in_steps:
            self.total_steps -= self.offset
        if step // self.steps_per_epoch == epoch:
            self._shifted = epoch, given - step % self.steps_per_epoch * self.batch_size
        return step

    def _shift(self, epoch: int) -> int:
        shifted, samples = self._shifted
        return samples if epoch == shifted else 0

    def samples(self, step: int) -> Tensor:
        """This process's samples of a step, int64 of shape (B,)."""
        clock, share = self.clock(step), self.share
        shift = self._shift(clock.epoch)
        return samples_of_step(clock, len(self.source), self.batch_size, self.seed, share.rank, share.processes, shift)

    @property
    def _faults(self) -> dict[str, str]:
        return {} if self.source.bad_files is None else self.source.bad_files.faults

    @property
    def unreadable(self) -> int:
        """How many files are known to be damaged that were not when the run began."""
        return len(self._faults) - self._known_bad

    def untold(self) -> dict[str, Any]:
        """What this process has found and the others have not heard of; empty if there is nothing."""
        return {file: fault for file, fault in self._faults.items() if file not in self._told}

    def learn(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Takes on what is ``untold`` in each process, this one among them: a file that two have met counts once."""
        for faults in found:
            if self.source.bad_files is not None:
                self.source.bad_files.learn(faults)
            self._told |= faults.keys()

    def bear(self, unreadable: int) -> None:
        """Goes on with so many damaged files, found by all processes since the run began.

        Raises:
            ConfigError: together with those left out at the start they are too many.
        """
        if self.source.bad_files is not None and unreadable:
            self.source.bad_files.stop_if_too_many(self._known_bad + unreadable)

    def state_dict(self) -> dict[str, Any]:
        """What a resume goes on counting from: the damaged files that are known."""
        return {"bad_files": dict(self._faults)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it on, on every process."""
        self._faults.update(state["bad_files"])
        self._told |= self._faults.keys()

    def from_step(self, start: int) -> Iterator[Batch]:
        """The batches from a step to the run's end; a resume is nothing but another start."""
        crops = self._crops_of_pixels(start) if self._pixels is not None else self._crops_of_files(start)
        for step, (index, views) in enumerate(crops, start):
            clock = self.clock(step)
            finished = self.views.finish(views, index, clock.epoch)
            label = None if self._labels is None else self._labels[index].to(self.share.device)
            domain = None if self.source.domains is None else self.source.domains[index].to(self.share.device)
            yield Batch(clock, index.to(self.share.device), finished, label, domain)

    def _crops_of_pixels(self, start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        assert self._pixels is not None
        for step in range(start, self.total_steps):
            index = self.samples(step)
            pixels = self._pixels[index].to(self.share.device, non_blocking=True)
            yield index, self.views.of_pixels(pixels, index, self.clock(step).epoch)

    @property
    def _crop_bytes(self) -> int:
        """Of this process's share of a step."""
        return self.views.bytes_of(self.batch_size // self.share.processes, self.source.channels)

    def _crops_of_files(self, start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        pin = self.share.device.type == "cuda"
        for item in read_items(_Steps(self), self.workers, pin, self._crop_bytes, range(start, self.total_steps)):
            if isinstance(item, UserError):
                raise item
            self.replaced = item.index if item.faults else None
            for sample, fault in item.faults.items():
                note_bad(self.source, sample, fault)
            yield item.index, [crop.to(self.share.device, non_blocking=True) for crop in item.views]


def default_workers(share: DistInfo) -> int:
    """The cores of this machine, shared by the processes on it; more than sixteen wait for one another's memory."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", share.processes))
    return max(1, min(16, len(os.sched_getaffinity(0)) // on_this_machine))


def note_bad(source: IndexedDataset, sample: int, error: DecodeError) -> None:
    """Counts a sample that was replaced.

    Raises:
        DecodeError: the source bears none.
        ConfigError: it bears no more.
    """
    if source.bad_files is None:
        raise error
    source.bad_files.note(source.describe(sample), error.fault)


def open_or_replace(source: IndexedDataset, index: int) -> Image.Image:
    """A decoded image; of one that can't be decoded its neighbor, of the same class, which is counted.

    Raises:
        DecodeError: the source bears no such image, or the neighbors can't be decoded either.
        ConfigError: it bears no more.
    """
    for _ in range(NEIGHBORS):
        try:
            return source.open_image(index)
        except DecodeError as error:
            note_bad(source, index, error)
            index, last = source.neighbor(index), error
    raise last


def open_readable(source: IndexedDataset, index: int) -> Image.Image | None:
    """A decoded image; None for one that can't be decoded, which is counted.

    Figures and probes leave such an image out: a neighbor would be measured against another image's target.

    Raises:
        DecodeError: the source bears no such image.
        ConfigError: it bears no more.
    """
    try:
        return source.open_image(index)
    except DecodeError as error:
        note_bad(source, index, error)
        return None


def read_readable(
    source: IndexedDataset,
    preprocessing: Preprocessing,
    device: torch.device,
    index: Tensor,
    chunk: int = 256,
    open_image: Callable[[IndexedDataset, int], Image.Image | None] = open_readable,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads samples once, in order, without randomness; those that can't be decoded are left out.

    Args:
        source: numbered samples.
        preprocessing: what is done to the images.
        device: where the images are wanted.
        index: which samples, int64 of shape (N,).
        chunk: samples at a time.
        open_image: decodes one image; None leaves it out.

    Yields:
        The samples that were read, int64 of shape (B,) with B ≤ chunk, and their images, float32 of shape (B, C, size, size).
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in index.split(chunk):
            if source.pixels is not None:
                yield part, preprocessing.of_pixels(source.pixels[part].to(device))
                continue
            opened = list(pool.map(partial(open_image, source), part.tolist()))
            images = [image for image in opened if image is not None]
            if images:
                read = torch.tensor([image is not None for image in opened])
                yield part[read], preprocessing.of_files(images).to(device)


def read_in_order(
    source: IndexedDataset,
    preprocessing: Preprocessing,
    device: torch.device,
    index: Tensor | None = None,
    chunk: int = 256,
) -> Iterator[Tensor]:
    """The images of :func:`read_readable`, of all samples by default; neighbors replace those that can't be decoded."""
    index = torch.arange(len(source)) if index is None else index
    for _, images in read_readable(source, preprocessing, device, index, chunk, open_or_replace):
        yield images
