"""A stream's batches: shards shared out among processes and workers, shuffled and resumed by name.

A process's shards are dealt to *lanes*, and step ``s`` takes its samples from lane ``s mod lanes``. A lane belongs to one
worker, so no worker reads what another needs, and the number of workers changes nothing. Within a lane, shards come in an
order drawn by name for each epoch, and samples are dealt out in *blocks*: as many as are held to be shuffled, in an order
drawn by name too. A block's content and order follow from its number alone, so a resume passes over what comes before without
decoding it.

What a process sees is a pure function of (seed, epoch, rank, processes, position). Unlike numbered samples, another number of
processes deals the shards otherwise.
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
from ssl_pipeline.data.encoded import InMemoryDataset, Sample, StreamDataset
from ssl_pipeline.data.loader import TrainLoader, read_crops
from ssl_pipeline.rng import derive_seed, hash_bits, permutation
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views

_log = logging.getLogger("ssl_pipeline")


def sample_id(shard: str, position: int, again: int = 0) -> int:
    """The number of a sample: 63 bits of its shard's name and its place there, from 0.

    It is another one where the sample was seen ``again`` in one epoch: its views should not be the same.
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

    ``lane`` is one of all ``lanes`` of all processes, ``block`` samples are held to be shuffled, and the epoch's first ``start`` are passed
    over.

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


class StreamLoader(TrainLoader):
    """The batches of a stream.

    Raises:
        ConfigError: there are fewer shards than processes.
    """

    source: StreamDataset

    def __post_init__(self) -> None:
        super().__post_init__()
        source, processes = self.source, self.share.processes
        if len(source.shards) < processes:
            raise ConfigError(
                f"{source.name} has {len(source.shards)} shard(s), and {processes} processes need one each: write "
                "smaller shards, or start fewer processes."
            )
        self.lanes = lanes_of_process(len(source.shards), processes)
        if self.num_workers:  # as many lanes for each
            self.num_workers = max(n for n in (8, 4, 2, 1) if n <= min(self.lanes, self.num_workers))
        self.block = max(1, source.block // self.lanes)
        self._begun = 0, 0, [0] * self.lanes  # an epoch, its first step here, what lanes gave before
        self._unreadable, self._new_errors = 0, 0

    def position(self, step: int) -> dict[str, Any]:
        lanes = [self.given(step, lane) for lane in range(self.lanes)]
        return {"epoch": self.clock(step).epoch, "samples": sum(lanes) * self.share.processes, "lanes": lanes}

    def resume_epoch(self, epoch: int, step: int, position: Mapping[str, Any]) -> None:
        # Another number of processes deals the shards otherwise: lanes go on from as many samples as they would have given.
        lanes = list(position["lanes"])
        if len(lanes) == self.lanes and sum(lanes) * self.share.processes == int(position["samples"]):
            self._begun = epoch, step, lanes

    def given(self, step: int, lane: int) -> int:
        """How many samples of a step's epoch a lane of this process has given before that step."""
        epoch = self.clock(step).epoch
        begun, first, before = self._begun
        if begun != epoch:
            first, before = epoch * self.steps_per_epoch, [0] * self.lanes
        steps = (step - 1 - lane) // self.lanes - (first - 1 - lane) // self.lanes
        return before[lane] + steps * self.local_batch_size

    @property
    def unreadable(self) -> int:
        return self._unreadable

    def new_errors(self) -> dict[str, Any]:
        return {"images": self._new_errors} if self._new_errors else {}

    def merge_errors(self, found: Sequence[Mapping[str, Any]]) -> None:
        # No two processes read the same shard in an epoch, so numbers can be added.
        self._unreadable += sum(numbers.get("images", 0) for numbers in found) - self._new_errors
        self._new_errors = 0

    def check_bad_files(self) -> None:
        """A stream that leaves out unreadable images at all allows any number."""

    def state_dict(self) -> dict[str, Any]:
        return {"unreadable": self._unreadable}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._unreadable = state["unreadable"]

    def read(self, start: int) -> Iterator[Batch]:
        for batch in self.read_by_workers(_Steps(self, start)):
            if batch.faults and not self._unreadable:
                first = next(iter(batch.faults.values()))
                _log.warning("%s It is left out, and so are further ones, which are only counted.", first)
            self._unreadable += len(batch.faults)
            self._new_errors += len(batch.faults)
            yield batch


class _Steps(IterableDataset[Batch | UserError]):
    """The steps that a worker makes: those of its lanes."""

    def __init__(self, loader: StreamLoader, start: int) -> None:
        self._loader, self._start = loader, start

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        loader, share = self._loader, self._loader.share
        lanes, running = loader.lanes, dict[int, tuple[int, Iterator[tuple[int, Sample]]]]()
        for step in range(self._start + worker, loader.total_steps, workers):
            lane, clock = step % lanes, loader.clock(step)
            epoch = clock.epoch
            if lane not in running or running[lane][0] != epoch:
                number, given = share.rank * lanes + lane, loader.given(step, lane)
                samples = samples_of_lane(
                    loader.source, loader.seed, epoch, number, lanes * share.processes, loader.block, given
                )
                running[lane] = epoch, samples
            try:
                drawn = list(itertools.islice(running[lane][1], loader.local_batch_size))
                yield read_stream_crops(loader.source, loader.views, clock, drawn, loader.with_labels)
            except UserError as error:
                yield error
                return


def read_stream_crops(
    source: StreamDataset, views: Views, clock: TrainProgress, drawn: list[tuple[int, Sample]], with_labels: bool
) -> Batch:
    """Decodes and crops a step's samples, each given with its id; the next one replaces one that is damaged.

    Raises:
        DecodeError: an image can't be decoded and is not to be skipped, or none can.
        ConfigError: a label or domain is missing.
    """
    by_id = dict(drawn)
    held = InMemoryDataset(source.name, list(by_id.values()), source.channels).at_range(source.value_range)
    attempts = len(by_id) if source.skip_unreadable else 1
    batch = read_crops(held, views, clock, torch.arange(len(held)), attempts, torch.tensor(list(by_id)))
    samples = [by_id[number] for number in batch.index.tolist()]
    if with_labels:
        labels = [sample.label for sample in samples if sample.label is not None]
        if len(labels) < len(samples):
            without = next(sample.name for sample in samples if sample.label is None)
            raise ConfigError(f"{without} has no label, and this task reads labels: see `data.label`.")
        batch.label = torch.tensor(labels)
    if source.has_domains:
        batch.domain = torch.tensor([_domain_id(sample) for sample in samples])
    return batch


def _domain_id(sample: Sample) -> int:
    """The number of a sample's domain, the same in each process that meets it."""
    if sample.domain is None:
        raise ConfigError(f"{sample.name} does not say what domain it is from: mend it, or see `data.domain`.")
    return derive_seed("domain", sample.domain)
