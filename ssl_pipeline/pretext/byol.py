"""BYOL: predict a slowly moving teacher's projection of the other view; no negatives.

    ℓ = −½ [ cos(q(z₁), z′₂) + cos(q(z₂), z′₁) ],   θ′ ← m θ′ + (1 − m) θ

with q the predictor and z′ the teacher's projections, through which no gradient flows.

When to use: small batches, and data where many images look alike, which negatives would push apart. Watch
``eval/effective_rank``: nothing but the predictor and the teacher keep it from collapse. Grill et al. 2020, arXiv
2006.07733, equation 2.
"""

from __future__ import annotations

from pydantic import Field

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.models.ema import EMAModel, EMAMomentumConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import prediction_head
from ssl_pipeline.pretext._base import ProjectionConfig, ProjectionTask, cosine_loss, forward_views


class BYOL(ProjectionTask):
    """See :class:`Config`. The loss is the negative cosine, which differs from the paper's 2 − 2·cos by scale and offset."""

    config: Config

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.predictor = prediction_head(config.projection_width, config.predictor_width)
        self.teacher = EMAModel(self.student())

    def embed(self, batch: Batch) -> Embeddings:
        predictions = forward_views(lambda images: self.predictor(self.project(images)), batch.views)
        targets = forward_views(self.teacher, batch.views)
        return {
            "prediction 0": predictions[0], "prediction 1": predictions[1], "target 0": targets[0], "target 1": targets[1],
        }  # fmt: skip

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        return cosine_loss(embeddings, "target")

    def after_step(self, batch: Batch) -> None:
        self.teacher.follow(self.student(), self.config.momentum.at(batch.clock))


class Config(ProjectionConfig):
    """BYOL (Grill et al. 2020).

    Attributes:
        momentum: of the teacher.
        predictor_width: between the predictor's two layers.
    """

    task = BYOL
    hidden_width: int = Field(4096, ge=1)
    projection_width: int = Field(256, ge=2)
    momentum: EMAMomentumConfig = EMAMomentumConfig(start=0.996)
    predictor_width: int = Field(4096, ge=1)
