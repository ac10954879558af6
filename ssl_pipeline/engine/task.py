"""The contract of a task: what the loop knows of the module that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.schedules import TrainProgress

Embeddings = dict[str, Tensor]


@dataclass
class StepOutput:
    """The loss and metrics of a step.

    Attributes:
        loss: a scalar, the mean over this process's samples.
        metrics: further scalars to log.
        details: computes metrics that cost time; called at logged steps alone.
    """

    loss: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    details: Callable[[], dict[str, Tensor]] | None = None


class Task(nn.Module, ABC):
    """A batch goes in, a loss comes out. All state that must survive a resume is in parameters and persistent buffers.

    ``embed`` and ``objective`` change no state but BatchNorm's running statistics: a step whose loss is not finite is skipped, and
    then ``after_step`` is not called.

    Attributes:
        reads_labels: whether the task needs ``batch.label``.
        encoder: what the next stage takes over.
        synchronizes_norms: whether its BatchNorms see the batch of all GPUs, rather than each its own share.
    """

    reads_labels: ClassVar[bool] = False
    synchronizes_norms: bool = True
    encoder: Encoder

    @abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """The network's part: views to named embeddings, each with the samples in its first dimension."""

    @abstractmethod
    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """The loss's part: embeddings to a scalar. Called once a step, with this process's whole share of the batch."""

    def forward(self, batch: Batch, gradients: Embeddings | None = None) -> StepOutput:
        """Both; what DistributedDataParallel wraps.

        Args:
            batch: a batch, or a micro-batch of GradCache.
            gradients: of the loss by each embedding, in GradCache's second pass: the loss returned is then the linear function of
                the embeddings that has these gradients.
        """
        embeddings = self.embed(batch)
        if gradients is None:
            return self.objective(embeddings, batch)
        terms = [(embeddings[name] * gradient).sum() for name, gradient in gradients.items()]
        return StepOutput(torch.stack(terms).sum())

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters with their own share of the learning rate: dicts of ``params`` (named) and ``lr_factor``."""
        return [{"params": [(n, p) for n, p in self.named_parameters() if p.requires_grad], "lr_factor": 1.0}]

    def frozen(self, clock: TrainProgress) -> list[nn.Parameter]:
        """Parameters that a step leaves unchanged although the loss has a gradient for them.

        They take part in the backward pass, since processes exchange the same gradients at every step. Then their gradient is
        dropped: a gradient of zero would still decay them, and would fill AdamW's moments with zeros, after which its first steps
        are several times too large.
        """
        del clock
        return []

    def prime(self, extract: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
        """Fills what depends on all samples before the first step, such as a memory; not called on a resume.

        Args:
            extract: applies a function from images (B, C, H, W) to rows (B, D) to all samples, without randomness; returns the rows
                in the samples' order, on the CPU.
        """
        del extract

    def after_step(self, batch: Batch) -> None:
        """What follows the optimizer's step: moving averages, queues, memories. Never done inside backward."""
        del batch


class PretextConfig(ComponentConfig, ABC):
    """The base of every pretext task's ``Config``.

    Attributes:
        views_needed: global views of an image that the task needs; None for any number.
        takes_local_views: whether it also takes multi-crop's local views.
    """

    views_needed: ClassVar[int | None] = 2
    takes_local_views: ClassVar[bool] = False

    @abstractmethod
    def build(self, encoder: Encoder, source: ImageDataset) -> Task:
        """The task around an encoder, for a source (a memory needs to know how many samples there are: no stream does)."""
