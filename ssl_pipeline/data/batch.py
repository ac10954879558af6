"""What a training step receives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.schedules import TrainProgress


@dataclass
class Batch:
    """This process's share of a step's global batch.

    Attributes:
        clock: the step it belongs to.
        index: the samples' numbers in their source, int64 of shape (B,).
        views: per view the normalized images, float32 of shape (B, C, H, W); in the loader the crops: uint8, or float32 in [0, 1].
        label: int64 of shape (B,), or None where the task does not read labels.
        domain: int64 of shape (B,), or None where the source has no domains.
        target: what stands beside the first view where a class is not enough (``data.targets``): a tensor with the samples
            in its first dimension, or a list with one entry a sample; None otherwise.
        faults: what is wrong with the samples that neighbors have replaced, by their numbers.
    """

    clock: TrainProgress
    index: Tensor
    views: list[Tensor]
    label: Tensor | None = None
    domain: Tensor | None = None
    target: Any = None
    faults: dict[int, DecodeError] = field(default_factory=dict)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` samples, the last one perhaps smaller."""
        parts = []
        for low in range(0, len(self.index), size):
            part = slice(low, low + size)
            label, domain, target = (
                None if beside is None else beside[part] for beside in (self.label, self.domain, self.target)
            )
            views = [view[part] for view in self.views]
            parts.append(Batch(self.clock, self.index[part], views, label, domain, target))
        return parts
