"""Barlow Twins: the cross-correlation of two views' projections should be the identity matrix.

    ℓ = Σ_d (1 − C_dd)² + λ Σ_{d≠e} C_de²,   C = Aᵀ B ÷ N

with A and B both views' projections, each feature standardized over the batch, and λ ``lambda_param``.

When to use: neither negatives nor a teacher; needs a wide projection. Zbontar et al. 2021, arXiv 2103.03230,
equations 1 and 2.
"""

from __future__ import annotations

from lightly.loss import BarlowTwinsLoss
from pydantic import Field

from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext._base import BatchStatisticsTask, ProjectionConfig


class Config(ProjectionConfig):
    """Barlow Twins (Zbontar et al. 2021).

    Attributes:
        lambda_param: weight of the decorrelation against the invariance.
    """

    layers: int = Field(3, ge=1)
    projection_width: int = Field(2048, ge=2)
    lambda_param: float = Field(0.005, gt=0)

    def build(self, encoder: Encoder, source: ImageDataset) -> BatchStatisticsTask:
        return BatchStatisticsTask(self, encoder, BarlowTwinsLoss(self.lambda_param))
