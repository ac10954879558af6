"""A stream's batches: shards shared out among processes and workers, shuffled and resumed by name.

A process's shards are dealt to *lanes*, and step ``s`` takes its samples from lane ``s mod lanes``. A lane belongs to one
worker, so that no worker reads what another needs, and their number changes nothing. Within a lane, shards come in an order
that is drawn by name for each epoch, and their samples are dealt out in *blocks*: as many as are held to be shuffled, in an
order drawn by name too. A block's content and order follow from its number alone, so a resume passes over what comes before
without decoding it.

What a process sees is a pure function of (seed, epoch, rank, processes, position). Other than with numbered samples, another
number of processes deals the shards otherwise.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset, Sample, StreamDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, default_workers
from ssl_pipeline.data.order import step_at
from ssl_pipeline.data.stream_crops import StreamCrops, read_stream_crops
from ssl_pipeline.data.workers import read_items
from ssl_pipeline.rng import derive_seed, hash_bits, permutation
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views

_log = logging.getLogger("ssl_pipeline")


def sample_id(shard: str, position: int, again: int = 0) -> int:
    """The number of a sample that has none: 63 bits, of its shard's name and its place there.

    Args:
        shard: the name.
        position: from 0.
        again: how often the sample has been seen in this epoch before: its views should not be the same.
    """
    name = (shard, again) if again else (shard,)
    return int(hash_bits(torch.tensor(position), derive_seed("sample", *name))) & ((1 << 63) - 1)


def lanes_of_process(shards: int, processes: int) -> int:
    """Lanes that each process deals its shards to: up to 8, as long as they hold about equally many."""
    fits = [n for n in (8, 4, 2) if shards % (n * processes) == 0 or shards >= 4 * n * processes]
    return fits[0] if fits else 1


def samples_of_lane(
    stream: StreamDataset, seed: int, epoch: int, lane: int, lanes: int, block: int, start: int = 0
) -> Iterator[tuple[int, Sample]]:
    """A lane's samples without an end, each with its id.

    A lane that has given all its samples begins again, on shards dealt anew: an epoch's length is declared, and a lane may
    hold a little less or more than its share.

    Args:
        stream: the shards.
        seed: the run's seed.
        epoch: the epoch.
        lane: which of all lanes of all processes.
        lanes: how many there are.
        block: samples that are held to be shuffled.
        start: samples of the epoch to pass over.

    Raises:
        ConfigError: there are none.
    """
    for again in itertools.count():
        order = permutation(len(stream.shards), seed, "shards", epoch, again)[lane::lanes].tolist()
        passed = start // block * block
        stored, left = _from(stream, order, passed)
        start -= passed - left
        given = passed - left
        for number in itertools.count(passed // block) if left == 0 else ():
            held = list(itertools.islice(stored, block))
            if not held:
                break
            for place in permutation(len(held), seed, "block", epoch, again, lane, number)[start:].tolist():
                shard, sample = held[place]
                yield sample_id(stream.shards[shard], sample.position, again), sample
            given, start = given + len(held), max(0, start - len(held))
        if given == 0:
            raise ConfigError(
                f"{stream.name}: {len(order)} shard(s) hold no image: see the keys of `data` in `configs/data`."
            )


def _from(stream: StreamDataset, order: list[int], start: int) -> tuple[Iterator[tuple[int, Sample]], int]:
    """The samples of shards in an order, from a place on; and how far that lies behind their end, 0 if it does not."""
    for number, shard in enumerate(order):
        size = stream.size(shard) if start else 0
        if start and start >= size:
            start -= size
            continue
        parts = [(shard, start), *((later, 0) for later in order[number + 1 :])]
        return ((shard, sample) for shard, begin in parts for sample in stream.read(shard, begin)), 0
    return iter(()), start


class StreamLoader:
    """The training batches of a run on a stream; to the loop the same as ``IndexedLoader``.

    Args:
        source: the stream.
        views: the random views.
        batch_size: samples of a step over all processes.
        seed: the run's seed.
        share: this process's share.
        total_steps: the run's length.
        workers: processes that read and decode; at most as many as there are lanes. None settles it by the machine.
        with_labels: whether batches carry labels.

    Raises:
        ConfigError: there are fewer shards than processes.
    """

    def __init__(
        self,
        source: StreamDataset,
        views: Views,
        batch_size: int,
        seed: int,
        share: DistInfo,
        total_steps: int,
        workers: int | None = None,
        with_labels: bool = False,
    ) -> None:
        if len(source.shards) < share.processes:
            raise ConfigError(
                f"{source.name} has {len(source.shards)} shard(s), and {share.processes} processes need one each: write "
                "smaller shards, or start fewer processes."
            )
        self.source, self.views, self.share = source, views, share
        self.batch_size, self.seed, self.total_steps, self.with_labels = batch_size, seed, total_steps, with_labels
        # Of a length that nobody knows the whole run is one epoch; what is seen again in it gets an id of its own.
        self.steps_per_epoch = total_steps if source.length is None else source.length // batch_size
        self.lanes = lanes_of_process(len(source.shards), share.processes)
        self.offset, self._begun = 0, (0, 0, [0] * self.lanes)  # an epoch, its first step here, what lanes gave before
        self.block = max(1, source.block // self.lanes)
        wanted = default_workers(share) if workers is None else workers
        self.workers = 0 if workers == 0 else max(n for n in (8, 4, 2, 1) if n <= min(self.lanes, max(1, wanted)))
        self.unreadable, self._untold = 0, 0

    def clock(self, step: int) -> TrainProgress:
        """The clock of a step."""
        return TrainProgress(step, self.total_steps, self.steps_per_epoch, self.offset)

    def position(self, step: int) -> dict[str, Any]:
        """How far the run has come before a step: the epoch, its samples given to all processes, and those of each lane."""
        lanes = [self.given(step, lane) for lane in range(self.lanes)]
        return {"epoch": self.clock(step).epoch, "samples": sum(lanes) * self.share.processes, "lanes": lanes}

    def go_on(self, position: Mapping[str, Any], taken: int, in_steps: bool) -> int:
        """Continues a run in the middle of an epoch, as :meth:`IndexedLoader.go_on` does; each lane goes on where it was.

        With another number of processes the shards are dealt otherwise, and lanes go on from as many samples as they would have given.
        """
        epoch, given = int(position["epoch"]), int(position["samples"])
        if self.source.length is None:
            step = given // self.batch_size
        else:
            step = step_at(epoch, given, self.source.length, self.batch_size)
        self.offset = taken - step
        if in_steps:
            self.total_steps -= self.offset
        if self.source.length is None:
            self.steps_per_epoch = max(1, self.total_steps)
        if len(position["lanes"]) == self.lanes and sum(position["lanes"]) * self.share.processes == given:
            self._begun = epoch, step, list(position["lanes"])
        return step

    def given(self, step: int, lane: int) -> int:
        """How many samples of a step's epoch a lane of this process has given before that step."""
        epoch = self.clock(step).epoch
        begun, first, before = self._begun
        if begun != epoch:
            first, before = epoch * self.steps_per_epoch, [0] * self.lanes
        steps = (step - 1 - lane) // self.lanes - (first - 1 - lane) // self.lanes
        return before[lane] + steps * (self.batch_size // self.share.processes)

    def bear(self, unreadable: int) -> None:
        """Goes on with any number of unreadable images, if the source skips them at all."""

    def untold(self) -> dict[str, int]:
        """How many images this process has left out that the others have not heard of; empty if there are none."""
        return {"images": self._untold} if self._untold else {}

    def learn(self, found: Sequence[Mapping[str, int]]) -> None:
        """Takes on what is ``untold`` in each process: no two read the same shard in an epoch, so numbers will do."""
        self.unreadable += sum(numbers.get("images", 0) for numbers in found) - self._untold
        self._untold = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resume goes on counting from: how often an image was left out."""
        return {"unreadable": self.unreadable}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it on, on every process."""
        self.unreadable = state["unreadable"]

    def from_step(self, start: int) -> Iterator[Batch]:
        """The batches from a step to the run's end; a resume is nothing but another start.

        Raises:
            UserError: a shard is missing or damaged, or an image is and is not to be skipped.
        """
        crop_bytes = self.views.bytes_of(self.batch_size // self.share.processes, self.source.channels)
        items = read_items(_Steps(self, start), self.workers, self.share.device.type == "cuda", crop_bytes)
        for step, item in enumerate(items, start):
            if isinstance(item, UserError):
                raise item
            self._count(item.faults)
            clock, device = self.clock(step), self.share.device
            views = self.views.finish(
                [crop.to(device, non_blocking=True) for crop in item.views], item.index, clock.epoch
            )
            label = torch.tensor(item.labels, device=device) if self.with_labels else None
            domain = torch.tensor(item.domains, device=device) if self.source.has_domains else None
            yield Batch(clock, item.index.to(device), views, label, domain)

    def _count(self, faults: list[str]) -> None:
        if faults and not self.unreadable:
            _log.warning("%s It is left out, and so are further ones, which are only counted.", faults[0])
        self.unreadable += len(faults)
        self._untold += len(faults)


def build_loader(
    source: ImageDataset,
    views: Views,
    batch_size: int,
    seed: int,
    share: DistInfo,
    total_steps: int,
    workers: int | None = None,
    with_labels: bool = False,
) -> IndexedLoader | StreamLoader:
    """The batches of numbered samples or of a stream; see :class:`IndexedLoader` and :class:`StreamLoader`."""
    settings = (views, batch_size, seed, share, total_steps, workers, with_labels)
    if isinstance(source, StreamDataset):
        return StreamLoader(source, *settings)
    assert isinstance(source, IndexedDataset)
    return IndexedLoader(source, *settings)


class _Steps(IterableDataset[StreamCrops | UserError]):
    """The steps of a run that a worker makes: an error is returned, because the loader would wrap it in a traceback."""

    def __init__(self, batches: StreamLoader, start: int) -> None:
        self._batches, self._start = batches, start

    def __iter__(self) -> Iterator[StreamCrops | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches, share = self._batches, self._batches.share
        lanes, size = batches.lanes, batches.batch_size // share.processes
        running: dict[int, tuple[int, Iterator[tuple[int, Sample]]]] = {}
        for step in range(self._start + worker, batches.total_steps, workers):
            lane, epoch = step % lanes, batches.clock(step).epoch
            if lane not in running or running[lane][0] != epoch:
                all_lanes, number = lanes * share.processes, share.rank * lanes + lane
                running[lane] = (
                    epoch,
                    samples_of_lane(
                        batches.source, batches.seed, epoch, number, all_lanes, batches.block, batches.given(step, lane)
                    ),
                )
            try:
                drawn = list(itertools.islice(running[lane][1], size))
                yield read_stream_crops(batches.source, batches.views, drawn, epoch, batches.with_labels)
            except UserError as error:
                yield error
                return
