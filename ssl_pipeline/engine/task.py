"""The contract of a task: what the loop knows of what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.data.stream import Stream
from ssl_pipeline.model.encoder import Encoder

Embeddings = dict[str, Tensor]


@dataclass
class StepOutput:
    """What a step gives.

    Attributes:
        loss: a scalar, the mean over this process's samples.
        metrics: further figures to log, scalars.
    """

    loss: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


class Task(nn.Module, ABC):
    """A batch goes in, a loss comes out. All state that must survive a resume is in parameters and persistent buffers.

    Attributes:
        reads_labels: whether the task needs ``batch.label``.
        encoder: what is handed over to the next stage.
    """

    reads_labels: ClassVar[bool] = False
    encoder: Encoder

    @abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """The network's part: views to named embeddings."""

    @abstractmethod
    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """The loss's part: embeddings to a scalar."""

    def forward(self, batch: Batch) -> StepOutput:
        """Both; this is what DistributedDataParallel sees."""
        return self.objective(self.embed(batch), batch)

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters with their own share of the learning rate: dicts of ``params`` (named) and ``lr_factor``."""
        return [{"params": [(n, p) for n, p in self.named_parameters() if p.requires_grad], "lr_factor": 1.0}]

    def after_step(self, batch: Batch) -> None:
        """What follows the optimizer's step: moving averages, queues, memories. Never done inside backward."""
        del batch


class PretextConfig(ComponentConfig, ABC):
    """The base of every pretext task's ``Config``.

    Attributes:
        views_needed: how many views of an image the task wants; None for any number.
    """

    views_needed: ClassVar[int | None] = 2

    @abstractmethod
    def build(self, encoder: Encoder, source: Indexed | Stream) -> Task:
        """The task around an encoder, for a source (a memory needs to know how many samples there are: no stream does)."""
