"""What a training step receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssl_pipeline.schedules import TrainProgress


@dataclass
class Batch:
    """This process's share of a step's global batch.

    Attributes:
        clock: the step it belongs to.
        index: the samples' numbers in their source, int64 of shape (B,).
        views: per view the normalized images, float32 of shape (B, C, H, W).
        label: int64 of shape (B,), or None where the task does not read labels.
        domain: int64 of shape (B,), or None where the source has no domains.
        target: what stands beside the first view where a class is not enough (``data.targets``): a tensor with the samples
            in its first dimension, or a list with one entry a sample; None otherwise.
    """

    clock: TrainProgress
    index: Tensor
    views: list[Tensor]
    label: Tensor | None = None
    domain: Tensor | None = None
    target: Any = None

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` samples, the last one perhaps smaller."""
        parts = range(0, len(self.index), size)
        return [
            Batch(
                self.clock,
                self.index[low : low + size],
                [view[low : low + size] for view in self.views],
                None if self.label is None else self.label[low : low + size],
                None if self.domain is None else self.domain[low : low + size],
                None if self.target is None else self.target[low : low + size],
            )
            for low in parts
        ]
