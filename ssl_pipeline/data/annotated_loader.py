"""The batches of annotated images: a target beside the first view of each."""

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
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.data.targets import AnnotatedDataset


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
