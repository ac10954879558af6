"""VICReg: equal projections of two views, whose features keep their variance and share no covariance."""

from __future__ import annotations

import torch
from lightly.loss import VICRegLoss
from pydantic import Field

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.data.stream import Stream
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.gather import gather_rows
from ssl_pipeline.losses.info_nce import precise
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.pretext._projected import Projected, ProjectedConfig, through


class Config(ProjectedConfig):
    """VICReg (Bardes et al. 2022).

    Attributes:
        invariance: weight of the distance between the views.
        variance: weight of the hinge on each feature's deviation.
        covariance: weight of the features' covariances.
    """

    layers: int = Field(3, ge=1)
    projection_width: int = Field(2048, ge=2)
    invariance: float = Field(25.0, ge=0)
    variance: float = Field(25.0, ge=0)
    covariance: float = Field(1.0, ge=0)

    def build(self, encoder: Encoder, source: Indexed | Stream) -> VICReg:
        """The task around an encoder."""
        del source  # neither labels nor the number of images matter
        return VICReg(self, encoder)


class VICReg(Projected):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.loss = VICRegLoss(config.invariance, config.variance, config.covariance)

    def embed(self, batch: Batch) -> Embeddings:
        """Both views' projections."""
        first, second = through(self.project, batch.views)
        return {"first": first, "second": second}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Over the rows of all processes: variance and covariance belong to the whole batch."""
        del batch
        first, second = embeddings["first"], embeddings["second"]
        with torch.autocast(first.device.type, enabled=False):
            return StepOutput(self.loss(gather_rows(precise(first)), gather_rows(precise(second))))
