"""SimSiam: predict the other view's projection, through which no gradient flows; neither negatives nor a teacher.

    ℓ = −½ [ cos(q(z₁), stop(z₂)) + cos(q(z₂), stop(z₁)) ]

with q the predictor, and stop what lets no gradient through.

When to use: as BYOL, where a second copy of the network is too much memory. Watch ``eval/effective_rank``. Chen and
He 2021, arXiv 2011.10566, equations 1 to 4.
"""

from __future__ import annotations

import torch
from lightly.loss import NegativeCosineSimilarity
from pydantic import Field

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.info_nce import to_float32
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.head import prediction_head
from ssl_pipeline.pretext._projected import ProjectedConfig, ProjectionTask, forward_views, with_predictions


class Config(ProjectedConfig):
    """SimSiam (Chen and He 2021).

    Attributes:
        predictor_width: between the predictor's two layers: a bottleneck, as a wide one collapses.
    """

    layers: int = Field(3, ge=1)
    projection_width: int = Field(2048, ge=2)
    predictor_width: int = Field(512, ge=1)

    def build(self, encoder: Encoder, source: ImageDataset) -> SimSiam:
        """The task around an encoder."""
        del source  # neither labels nor the number of images matter
        return SimSiam(self, encoder)


class SimSiam(ProjectionTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder, final_norm=True)
        self.predictor = prediction_head(config.projection_width, config.predictor_width)
        self.distance = NegativeCosineSimilarity()

    def embed(self, batch: Batch) -> Embeddings:
        """Projections and predictions of both views."""
        return with_predictions(forward_views(self.project, batch.views), self.predictor)

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """The mean of both ways, in [-1, 1]."""
        del batch
        with torch.autocast(embeddings["projection 0"].device.type, enabled=False):
            ways = [
                self.distance(
                    to_float32(embeddings[f"prediction {i}"]), to_float32(embeddings[f"projection {1 - i}"].detach())
                )
                for i in (0, 1)
            ]
            return StepOutput(torch.stack(ways).mean())
