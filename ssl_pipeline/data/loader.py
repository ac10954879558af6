"""From a dataset to the batches of a training run, which are a pure function of the step."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_pipeline.config.base import UserError
from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import NEIGHBORS, ImageDataset, IndexedDataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.workers import read_items
from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views


@dataclass(frozen=True)
class DistInfo:
    """This process's share of the work, and the device it is done on."""

    rank: int
    processes: int
    device: torch.device


def default_workers(share: DistInfo) -> int:
    """The cores of this machine, shared by its processes; more than sixteen wait for one another's memory."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", share.processes))
    return max(1, min(16, len(os.sched_getaffinity(0)) // on_this_machine))


def read_crops(
    source: IndexedDataset,
    views: Views,
    clock: TrainProgress,
    index: Tensor,
    attempts: int = NEIGHBORS,
    ids: Tensor | None = None,
) -> Batch:
    """Decodes samples, each once for all its views and as small as they allow, and crops them.

    A sample that can't be decoded gives its place to its neighbor, under that one's number: a loss can know it for a repeat.

    Args:
        source: the dataset.
        views: the random views.
        clock: the step.
        index: which samples, int64 of shape (B,).
        attempts: how often a place is tried to be filled.
        ids: the numbers of the source's samples, by which views are drawn, where they are not their places.

    Raises:
        DecodeError: after so many attempts a place is still empty.
    """
    index, images, faults = index.clone(), dict[int, Image.Image](), dict[int, DecodeError]()
    pending = list(range(len(index)))
    for _ in range(attempts):
        sizes, numbers = source.sizes(index), index if ids is None else ids[index]
        factors = [1] * len(index) if sizes is None else views.reductions(sizes, numbers, clock.epoch)
        failed = []
        for place in pending:
            try:
                images[place] = source.open_reduced(int(index[place]), factors[place])
            except DecodeError as error:
                faults[int(index[place])] = error
                failed.append(place)
        if not failed:
            crops = views.of_files([images[i] for i in range(len(index))], numbers, clock.epoch, sizes)
            return Batch(clock, numbers, crops, faults=faults)
        for place in failed:
            index[place] = source.neighbor(int(index[place]))
        pending = failed
    raise next(reversed(faults.values()))


@dataclass(eq=False)
class TrainLoader(ABC):
    """The training batches of a run; what the loop and checkpoints know of its data.

    Attributes:
        source: the dataset. Without a known length, the whole run is one epoch.
        views: the random views.
        batch_size: samples of a step over all processes.
        seed: the run's seed.
        share: this process's share.
        total_steps: the run's length.
        workers: requested processes that read and decode; None chooses by the machine's cores.
        with_labels: whether batches carry labels; stage one's don't, except for tasks that ask for them.
        num_workers: processes that do.
        offset: optimizer steps that were taken beyond those of the clock; see :class:`ssl_pipeline.schedules.TrainProgress`.
    """

    source: ImageDataset
    views: Views
    batch_size: int
    seed: int
    share: DistInfo
    total_steps: int
    workers: int | None = None
    with_labels: bool = False

    def __post_init__(self) -> None:
        self.num_workers = default_workers(self.share) if self.workers is None else self.workers
        length = self.source.length
        self.steps_per_epoch = self.total_steps if length is None else length // self.batch_size
        self.offset = 0

    @abstractmethod
    def read(self, start: int) -> Iterator[Batch]:
        """Each step's crops from a step on, on any device."""

    @abstractmethod
    def position(self, step: int) -> dict[str, Any]:
        """How far the run has come before a step: the epoch, its ``samples`` given to all processes, and more."""

    @abstractmethod
    def resume_epoch(self, epoch: int, step: int, position: Mapping[str, Any]) -> None:
        """Sets what is left of an epoch that another batch size began; ``step`` is where this run goes on."""

    @property
    @abstractmethod
    def unreadable(self) -> int:
        """How many damaged images are known that were not when the run began."""

    @abstractmethod
    def new_errors(self) -> dict[str, Any]:
        """What this process has found damaged and the others have not heard of; empty if there is nothing."""

    @abstractmethod
    def merge_errors(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Merges what is new in each process, this one included."""

    @abstractmethod
    def check_bad_files(self) -> None:
        """Raises ConfigError if more damaged images are known, of all processes, than the dataset allows."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The damaged images that a resumed run already knows, or their number."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    @property
    def local_batch_size(self) -> int:
        """Samples of a step in this process."""
        return self.batch_size // self.share.processes

    def clock(self, step: int) -> TrainProgress:
        return TrainProgress(step, self.total_steps, self.steps_per_epoch, self.offset)

    def resume(self, position: Mapping[str, Any], taken: int, in_steps: bool) -> int:
        """Continues a run in the middle of an epoch, whatever its batch size was: no image is left out or given twice.

        Args:
            position: where it was, from :meth:`position`.
            taken: the optimizer steps that it has taken.
            in_steps: whether its length is a number of optimizer steps, those that were taken among them.

        Returns:
            The step to go on from, as :meth:`from_step` counts; ``total_steps`` or more where nothing is left.
        """
        epoch, given = int(position["epoch"]), int(position["samples"])
        length = self.source.length
        if length is None:  # one epoch without an end
            step = given // self.batch_size
        else:  # what is left of the epoch makes its last steps: as many as full batches are left
            step = (epoch + 1) * (length // self.batch_size) - max(0, length - given) // self.batch_size
        self.offset = taken - step
        if in_steps:
            self.total_steps -= self.offset
        if length is None:
            self.steps_per_epoch = max(1, self.total_steps)
        self.resume_epoch(epoch, step, position)
        return step

    def from_step(self, start: int) -> Iterator[Batch]:
        """The batches from a step to the run's end; a resume is nothing but another start.

        Raises:
            UserError: an image can't be read, and the dataset does not allow that.
        """
        device = self.share.device
        for batch in self.read(start):
            crops = [view.to(device, non_blocking=True) for view in batch.views]
            batch.views = self.views.finish(crops, batch.index, batch.clock.epoch)
            batch.index = batch.index.to(device)
            batch.label = None if batch.label is None else batch.label.to(device)
            batch.domain = None if batch.domain is None else batch.domain.to(device)
            yield batch

    def read_by_workers(self, steps: Dataset[Batch | UserError], sampler: range | None = None) -> Iterator[Batch]:
        """A step per item. A worker returns an error rather than raising it: torch would wrap it in a traceback."""
        item_bytes = self.views.bytes_of(self.local_batch_size, self.source.channels)
        for item in read_items(steps, self.num_workers, self.share.device.type == "cuda", item_bytes, sampler):
            if isinstance(item, UserError):
                raise item
            yield item


class _Steps(Dataset[Batch | UserError]):
    """A whole step per item, so that a worker draws all boxes of a batch at once."""

    def __init__(self, loader: IndexedLoader) -> None:
        self._loader = loader

    def __getitem__(self, step: int) -> Batch | UserError:
        loader = self._loader
        try:
            return read_crops(loader.source, loader.views, loader.clock(step), loader.samples(step))
        except UserError as error:
            return error


class IndexedLoader(TrainLoader):
    """The batches of numbered samples; those in memory need no workers."""

    source: IndexedDataset

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shifted = 0, 0  # an epoch, and the samples by which its steps begin later
        self._bad = self.source.bad_files or BadFiles(parse_limit("0"), 0)  # without one, the first error is raised
        self._known_bad, self._reported = len(self._bad.faults), set(self._bad.faults)

    def position(self, step: int) -> dict[str, Any]:
        epoch = self.clock(step).epoch
        return {"epoch": epoch, "samples": step % self.steps_per_epoch * self.batch_size + self._shift(epoch)}

    def resume_epoch(self, epoch: int, step: int, position: Mapping[str, Any]) -> None:
        if step // self.steps_per_epoch == epoch:
            self._shifted = epoch, int(position["samples"]) - step % self.steps_per_epoch * self.batch_size

    def _shift(self, epoch: int) -> int:
        shifted, samples = self._shifted
        return samples if epoch == shifted else 0

    def samples(self, step: int) -> Tensor:
        """The samples of a step that belong to this process, int64 of shape (B,).

        An epoch is a permutation of all samples; it is cut into global batches, and what is left over is dropped (repeating
        samples would make false negatives). Each process takes a contiguous slice of the global batch.
        """
        epoch, size = self.clock(step).epoch, self.local_batch_size
        assert size * self.share.processes == self.batch_size
        start = step % self.steps_per_epoch * self.batch_size + self._shift(epoch) + self.share.rank * size
        return _epoch_order(len(self.source), self.seed, epoch)[start : start + size]

    @property
    def unreadable(self) -> int:
        return len(self._bad.faults) - self._known_bad

    def new_errors(self) -> dict[str, Any]:
        return {file: fault for file, fault in self._bad.faults.items() if file not in self._reported}

    def merge_errors(self, found: Sequence[Mapping[str, Any]]) -> None:
        for faults in found:  # a file that two processes have met counts once
            self._bad.learn(faults)
            self._reported |= faults.keys()

    def check_bad_files(self) -> None:
        self._bad.stop_if_too_many()

    def state_dict(self) -> dict[str, Any]:
        return {"bad_files": dict(self._bad.faults)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bad.faults.update(state["bad_files"])
        self._reported |= self._bad.faults.keys()

    def read(self, start: int) -> Iterator[Batch]:
        source, steps = self.source, range(start, self.total_steps)
        for batch in self.read_by_workers(_Steps(self), steps) if source.pixels is None else map(self._crop, steps):
            for sample, fault in batch.faults.items():
                source.note_bad(sample, fault)
            if self.with_labels and source.labels is not None:
                batch.label = source.labels[batch.index]
            if source.domains is not None:
                batch.domain = source.domains[batch.index]
            yield batch

    def _crop(self, step: int) -> Batch:
        """A step's crops of pixels in memory, made on the device."""
        assert self.source.pixels is not None
        clock, index = self.clock(step), self.samples(step)
        pixels = self.source.pixels[index].to(self.share.device, non_blocking=True)
        return Batch(clock, index, self.views.of_pixels(pixels, index, clock.epoch))


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    return permutation(samples, seed, "order", epoch)
