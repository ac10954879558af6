"""From a dataset to the batches of a training run, which are a pure function of the step."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_pipeline.config.base import UserError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.reading import Crops, note_bad, read_crops
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
    def read(self, start: int) -> Iterator[Crops]:
        """The crops of each step from a step on, on any device."""

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
    def check_bad_files(self, unreadable: int) -> None:
        """Raises ConfigError if so many damaged images, found by all processes, are more than the dataset allows."""

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
        """The clock of a step."""
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
        step = step_at(epoch, given, length, self.batch_size)
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
        for step, crops in enumerate(self.read(start), start):
            clock = self.clock(step)
            views = [view.to(device, non_blocking=True) for view in crops.views]
            views = self.views.finish(views, crops.index, clock.epoch)
            label, domain = (None if numbers is None else numbers.to(device) for numbers in (crops.label, crops.domain))
            yield Batch(clock, crops.index.to(device), views, label, domain)

    def read_by_workers(self, steps: Dataset[Crops | UserError], sampler: range | None = None) -> Iterator[Crops]:
        """A step per item. A worker returns an error rather than raising it: torch would wrap it in a traceback."""
        item_bytes = self.views.bytes_of(self.local_batch_size, self.source.channels)
        for item in read_items(steps, self.num_workers, self.share.device.type == "cuda", item_bytes, sampler):
            if isinstance(item, UserError):
                raise item
            yield item


class _Steps(Dataset[Crops | UserError]):
    """A whole step per item, so that a worker draws all boxes of a batch at once."""

    def __init__(self, loader: IndexedLoader) -> None:
        self._loader = loader

    def __getitem__(self, step: int) -> Crops | UserError:
        loader = self._loader
        try:
            return read_crops(loader.source, loader.views, loader.samples(step), loader.clock(step).epoch)
        except UserError as error:
            return error


class IndexedLoader(TrainLoader):
    """The batches of numbered samples; those in memory need no workers.

    Attributes:
        replaced: the samples of the last batch if neighbors replaced some of them; None otherwise.
    """

    source: IndexedDataset

    def __post_init__(self) -> None:
        super().__post_init__()
        self.replaced: Tensor | None = None
        self._shifted = 0, 0  # an epoch, and the samples by which its steps begin later
        self._known_bad = len(self._faults)
        self._reported = set(self._faults)

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
        """This process's samples of a step, int64 of shape (B,)."""
        clock, share = self.clock(step), self.share
        shift = self._shift(clock.epoch)
        return samples_of_step(clock, len(self.source), self.batch_size, self.seed, share.rank, share.processes, shift)

    @property
    def _faults(self) -> dict[str, str]:
        return {} if self.source.bad_files is None else self.source.bad_files.faults

    @property
    def unreadable(self) -> int:
        return len(self._faults) - self._known_bad

    def new_errors(self) -> dict[str, Any]:
        return {file: fault for file, fault in self._faults.items() if file not in self._reported}

    def merge_errors(self, found: Sequence[Mapping[str, Any]]) -> None:
        for faults in found:  # a file that two processes have met counts once
            if self.source.bad_files is not None:
                self.source.bad_files.learn(faults)
            self._reported |= faults.keys()

    def check_bad_files(self, unreadable: int) -> None:
        if self.source.bad_files is not None and unreadable:
            self.source.bad_files.stop_if_too_many(self._known_bad + unreadable)

    def state_dict(self) -> dict[str, Any]:
        return {"bad_files": dict(self._faults)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._faults.update(state["bad_files"])
        self._reported |= self._faults.keys()

    def read(self, start: int) -> Iterator[Crops]:
        labels = self.source.labels if self.with_labels else None
        steps = range(start, self.total_steps)
        items = self.read_by_workers(_Steps(self), steps) if self.source.pixels is None else map(self._crop, steps)
        for crops in items:
            self.replaced = crops.index if crops.faults else None
            for sample, fault in crops.faults.items():
                note_bad(self.source, sample, fault)
            crops.label = None if labels is None else labels[crops.index]
            crops.domain = None if self.source.domains is None else self.source.domains[crops.index]
            yield crops

    def _crop(self, step: int) -> Crops:
        """A step's crops of pixels in memory, made on the device."""
        assert self.source.pixels is not None
        index = self.samples(step)
        pixels = self.source.pixels[index].to(self.share.device, non_blocking=True)
        return Crops(index, self.views.of_pixels(pixels, index, self.clock(step).epoch), {})


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    return permutation(samples, seed, "order", epoch)


def samples_of_step(
    clock: TrainProgress, samples: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1, shift: int = 0
) -> Tensor:
    """The samples of a step that belong to a process, int64 of shape (batch_size // processes,).

    An epoch is a permutation of all samples; it is cut into global batches, and what is left over is dropped (repeating
    samples would make false negatives). Each process takes a contiguous slice of the global batch.

    Args:
        clock: the step; ``steps_per_epoch`` must be ``samples // batch_size``.
        samples: number of samples in the dataset.
        batch_size: samples of a step over all processes; a multiple of ``processes``.
        seed: the run's seed.
        rank: this process.
        processes: number of processes.
        shift: samples by which the epoch's steps begin later, where a run has come into it with another batch size.
    """
    assert clock.steps_per_epoch == samples // batch_size
    assert batch_size % processes == 0
    start = clock.step % clock.steps_per_epoch * batch_size + shift
    share = batch_size // processes
    return _epoch_order(samples, seed, clock.epoch)[start + rank * share : start + (rank + 1) * share]


def step_at(epoch: int, given: int, samples: int | None, batch_size: int) -> int:
    """The step of a run of this batch size that is as far as one which has given ``given`` samples of an epoch.

    What is left of the epoch makes its last steps: as many as full batches are left.
    """
    if samples is None:  # one epoch without an end
        return given // batch_size
    return (epoch + 1) * (samples // batch_size) - max(0, samples - given) // batch_size
