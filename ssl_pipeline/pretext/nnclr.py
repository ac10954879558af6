"""NNCLR: the positive of a view is the nearest neighbor, among many past images, of the image's other view.

    ℓ(i) = −log( exp(NN(zᵢ)·p₊ ÷ τ) ÷ Σⱼ exp(NN(zᵢ)·pⱼ ÷ τ) ),   NN(z) = argmax over the support set of z·s

with p the predictions of the batch's other views.

When to use: where positives should differ by more than augmentation can make them. The neighbors are noise at first.
Dwibedi et al. 2021, arXiv 2104.14548.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.gather import all_gather_ids, all_gather_rows
from ssl_pipeline.losses.info_nce import info_nce, normalize_rows
from ssl_pipeline.losses.memory_bank import MemoryQueue
from ssl_pipeline.losses.temperature import temperature_metrics
from ssl_pipeline.metrics.knn import nearest_neighbors
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import prediction_head
from ssl_pipeline.pretext._base import ContrastiveConfig, ProjectionTask, forward_views, with_predictions


class NNCLR(ProjectionTask):
    """See :class:`Config`. An image's own older rows may be its neighbors, as in the paper: they are positives anyway."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder, final_norm=config.normalized_projection)
        self.predictor = prediction_head(config.projection_width, config.predictor_width)
        self.queue = MemoryQueue(config.queue, config.projection_width)
        self._projections: Tensor | None = None

    def embed(self, batch: Batch) -> Embeddings:
        return with_predictions(forward_views(self.project, batch.views), self.predictor)

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        temperature = self.temperature(batch.clock)
        match = batch.index, all_gather_ids(batch.index)
        projections = [embeddings[f"projection {i}"].detach() for i in (0, 1)]
        self._projections = projections[0]
        neighbors = [self.nearest(rows) for rows in projections]
        keys = [all_gather_rows(embeddings[f"prediction {i}"]) for i in (0, 1)]
        losses = [info_nce(neighbors[i], keys[1 - i], match, temperature) for i in (0, 1)]
        details = partial(temperature_metrics, neighbors[0], keys[1].detach(), match, temperature)
        return StepOutput(torch.stack(losses).mean(), {"temperature": temperature, "queue": len(self.queue)}, details)

    def nearest(self, rows: Tensor) -> Tensor:
        """The support set's nearest rows, (B, D), by cosines in fp32; the rows themselves while it is empty."""
        support, _ = self.queue.keys()
        if not len(support):
            return rows
        with torch.autocast(rows.device.type, enabled=False):  # in bf16 many cosines of much alike rows are equal
            near = nearest_neighbors(normalize_rows(rows), support, 1, normalize=False)
            return support[torch.cat([index[:, 0] for _, index in near])]

    def after_step(self, batch: Batch) -> None:
        self.temperature.clamp()
        assert self._projections is not None
        self.queue.push(self._projections, batch.index)
        self._projections = None


class Config(ContrastiveConfig):
    """NNCLR (Dwibedi et al. 2021).

    Attributes:
        queue: the support set's rows.
        predictor_width: between the predictor's two layers.
        normalized_projection: whether a batch norm follows the projection head, as in the paper.
    """

    task = NNCLR
    contrasts_with = "neighbors"
    layers: int = Field(3, ge=1)
    projection_width: int = Field(256, ge=2)
    queue: int = Field(65536, ge=1)
    predictor_width: int = Field(4096, ge=1)
    normalized_projection: bool = True
