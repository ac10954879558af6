"""What a task is given at a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssl_pipeline.schedules import Clock


@dataclass
class Batch:
    """One process's share of a global batch.

    Attributes:
        clock: the step it belongs to.
        index: the samples' numbers in their source, int64 of shape (B,).
        views: per view the normalised images, float32 of shape (B, C, H, W).
        label: int64 of shape (B,), or None where the task does not read labels.
    """

    clock: Clock
    index: Tensor
    views: list[Tensor]
    label: Tensor | None = None
