"""SimSiam: predict the other view's projection, through which no gradient flows; neither negatives nor a teacher.

    ℓ = −½ [ cos(q(z₁), stop(z₂)) + cos(q(z₂), stop(z₁)) ]

with q the predictor, and stop what lets no gradient through.

When to use: as BYOL, where a second copy of the network is too much memory. Watch ``eval/effective_rank``. Chen and
He 2021, arXiv 2011.10566, equations 1 to 4.
"""

from __future__ import annotations

from pydantic import Field

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import prediction_head
from ssl_pipeline.pretext._base import ProjectionConfig, ProjectionTask, cosine_loss, forward_views, with_predictions


class SimSiam(ProjectionTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder, final_norm=True)
        self.predictor = prediction_head(config.projection_width, config.predictor_width)

    def embed(self, batch: Batch) -> Embeddings:
        return with_predictions(forward_views(self.project, batch.views), self.predictor)

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        return cosine_loss(embeddings, "projection")


class Config(ProjectionConfig):
    """SimSiam (Chen and He 2021).

    Attributes:
        predictor_width: between the predictor's two layers: a bottleneck, as a wide one collapses.
    """

    task = SimSiam
    layers: int = Field(3, ge=1)
    projection_width: int = Field(2048, ge=2)
    predictor_width: int = Field(512, ge=1)
