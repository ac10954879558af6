"""SwAV: each view predicts the cluster that another view of the image was assigned to.

    ℓ(z, q) = −Σₖ qₖ log pₖ,   p = softmax(z·C ÷ τ),   q = Sinkhorn(z′·C ÷ ε)

with C the prototypes and z′ another, global view of the image: Sinkhorn's alternation gives every prototype an equal
share of the batch.

When to use: with multi-crop (``transform=swav``), and where classes are groups rather than single images. Below a few
hundred images a step, set ``queue``. Caron et al. 2020, arXiv 2006.09882, equations 2 and 3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from lightly.loss import SwaVLoss
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.gather import rank_and_world_size
from ssl_pipeline.losses.info_nce import to_float32
from ssl_pipeline.losses.memory_bank import MemoryQueue
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import PrototypeHead
from ssl_pipeline.pretext._base import ProjectionConfig, ProjectionTask
from ssl_pipeline.schedules import Duration, TrainProgress, parse_duration


class SwAV(ProjectionTask):
    """See :class:`Config`. Sinkhorn's assignment runs in fp32 over the rows of all processes."""

    config: Config

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.prototypes = PrototypeHead(config.projection_width, config.prototypes)
        self.first_queue, self.second_queue = (MemoryQueue(config.queue, config.projection_width) for _ in range(2))
        self.loss = SwaVLoss(
            config.temperature, config.sinkhorn_iterations, config.sharpness, sinkhorn_gather_distributed=True
        )
        self._projections: list[Tensor] = []

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        views = [to_float32(rows) for rows in embeddings.values()]
        self._projections = [rows.detach() for rows in views[:2]]
        with torch.autocast(views[0].device.type, enabled=False):
            scores = [self.prototypes(rows) for rows in views]
            loss: Tensor = self.loss(scores[:2], scores[2:], self._queue_scores(batch))
        used = scores[0].detach().argmax(1).unique().numel()
        return StepOutput(loss.sum(), {"temperature": self.config.temperature, "prototypes_used": used})

    def frozen(self, clock: TrainProgress) -> list[nn.Parameter]:
        return [self.prototypes.weight] if clock.step < self.config.freeze_prototypes.on(clock) else []

    @torch.no_grad()
    def _queue_scores(self, batch: Batch) -> list[Tensor] | None:
        """This process's share of the queues, scored by today's prototypes; None while they are not in use."""
        if batch.clock.step < self.config.queue_start.on(batch.clock) or not len(self.first_queue):
            return None
        rank, processes = rank_and_world_size()
        rows = [queue.keys()[0] for queue in (self.first_queue, self.second_queue)]
        return [self.prototypes(part[rank::processes][: len(part) // processes]) for part in rows]

    def after_step(self, batch: Batch) -> None:
        if self.config.queue:
            for queue, rows in zip((self.first_queue, self.second_queue), self._projections, strict=True):
                queue.push(rows, batch.index)
        self._projections = []


class Config(ProjectionConfig):
    """SwAV (Caron et al. 2020). Takes two global views and any number of local ones (multi-crop).

    Attributes:
        temperature: of the predictions' softmax.
        prototypes: cluster centers.
        sharpness: ε of Sinkhorn's assignment; small is sharp.
        sinkhorn_iterations: alternations between equal clusters and whole samples.
        queue: rows of past batches that join the assignment where batches are small; 0 for none.
        queue_start: when they begin to: their embeddings are noise at first.
        freeze_prototypes: how long the prototypes stay as they started.
    """

    task = SwAV
    takes_local_views: ClassVar[bool] = True
    temperature: float = Field(0.1, gt=0)
    prototypes: int = Field(3000, ge=2)
    sharpness: float = Field(0.05, gt=0)
    sinkhorn_iterations: int = Field(3, ge=1)
    queue: int = Field(0, ge=0)
    queue_start: Duration = parse_duration("15 epochs")
    freeze_prototypes: Duration = parse_duration("1 epoch")
