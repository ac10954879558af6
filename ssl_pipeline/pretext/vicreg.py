"""VICReg: equal projections of two views, whose features keep their variance and share no covariance.

    ℓ = λ s(A, B) + μ ½ [v(A) + v(B)] + ν [c(A) + c(B)]
    s: mean squared difference,   v(Z) = mean_d max(0, 1 − std(Z_d)),   c(Z) = Σ_{d≠e} Cov(Z)_de² ÷ D

with λ ``sim_coeff``, μ ``std_coeff``, ν ``cov_coeff``.

When to use: as Barlow Twins, where each of the three terms should be seen and weighed by itself. Bardes et al. 2022,
arXiv 2105.04906, equations 1 to 6.
"""

from __future__ import annotations

from lightly.loss import VICRegLoss
from pydantic import Field

from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext._base import BatchStatisticsTask, ProjectionConfig


class Config(ProjectionConfig):
    """VICReg (Bardes et al. 2022).

    Attributes:
        sim_coeff: weight of the distance between the views.
        std_coeff: weight of the hinge on each feature's deviation.
        cov_coeff: weight of the features' covariances.
    """

    layers: int = Field(3, ge=1)
    projection_width: int = Field(2048, ge=2)
    sim_coeff: float = Field(25.0, ge=0)
    std_coeff: float = Field(25.0, ge=0)
    cov_coeff: float = Field(1.0, ge=0)

    def build(self, encoder: Encoder, source: ImageDataset) -> BatchStatisticsTask:
        return BatchStatisticsTask(self, encoder, VICRegLoss(self.sim_coeff, self.std_coeff, self.cov_coeff))
