"""The views and the training batches of a dataset, whichever kind it is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.encoded import StreamDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, TrainLoader
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.data.stream_loader import StreamLoader
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


def build_views(
    source: ImageDataset,
    config: ViewsConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> Views:
    """The views of a dataset's images, by a policy without ``auto``, at the mean and standard deviation that the encoder expects.

    Restyled views take the amplitude of images of the same dataset, drawn by the seed; of a stream, of its first ones.
    """
    count = max((view.amplitude_mix.styles for view in config.each() if view.amplitude_mix.probability > 0), default=0)
    if not count:
        return Views(config, mean, std, seed)
    lenders = source.preview()
    index = permutation(len(lenders), seed, "styles")[:count].sort().values
    plain = Preprocessing(config.size, (0.0,) * lenders.channels, (1.0,) * lenders.channels)
    styles = torch.cat(list(read_in_order(lenders, plain, torch.device("cpu"), index)))
    return Views(config, mean, std, seed, styles)


def build_loader(
    source: ImageDataset,
    views: Views,
    batch_size: int,
    seed: int,
    share: DistInfo,
    total_steps: int,
    workers: int | None = None,
    with_labels: bool = False,
) -> TrainLoader:
    """The batches of numbered samples (:class:`IndexedLoader`) or of a stream (:class:`StreamLoader`)."""
    settings = (views, batch_size, seed, share, total_steps, workers, with_labels)
    if isinstance(source, StreamDataset):
        return StreamLoader(source, *settings)
    assert isinstance(source, IndexedDataset)
    return IndexedLoader(source, *settings)


class AnnotatedLoader(IndexedLoader):
    """The training batches of an annotated source; see :class:`IndexedLoader`."""

    def from_step(self, start: int) -> Iterator[Batch]:
        """The batches from a step to the run's end, each with its ``target``; masks are read a few steps ahead."""
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            coming = iter(range(start, self.total_steps))
            ahead = deque(pool.submit(self._target, step) for step in islice(coming, 4))
            for step, batch in enumerate(super().from_step(start), start):
                target = ahead.popleft().result()
                if batch.faults:
                    target = self._target(step, batch.index.cpu())
                batch.target = to_device(target, self.share.device)
                ahead.extend(pool.submit(self._target, step) for step in islice(coming, 1))
                yield batch

    def _target(self, step: int, index: Tensor | None = None) -> Any:
        """The annotations of a step's samples, or of those that have taken the place of some."""
        annotations = self.source.annotations
        assert annotations is not None
        index = self.samples(step) if index is None else index
        return annotations.of_views(index, self.views, self.clock(step).epoch)


def to_device(target: Any, device: torch.device) -> Any:
    """A target on another device: a tensor, or lists and dictionaries of them."""
    if isinstance(target, Tensor):
        return target.to(device, non_blocking=True)
    if isinstance(target, dict):
        return {key: to_device(value, device) for key, value in target.items()}
    return [to_device(entry, device) for entry in target]
