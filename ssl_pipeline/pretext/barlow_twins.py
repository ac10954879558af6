"""Barlow Twins: the cross-correlation of two views' projections should be the identity matrix."""

from __future__ import annotations

import torch
from lightly.loss import BarlowTwinsLoss
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
    """Barlow Twins (Zbontar et al. 2021).

    Attributes:
        off_diagonal: weight of the decorrelation against the invariance.
    """

    layers: int = Field(3, ge=1)
    projection_width: int = Field(2048, ge=2)
    off_diagonal: float = Field(0.005, gt=0)

    def build(self, encoder: Encoder, source: Indexed | Stream) -> BarlowTwins:
        """The task around an encoder."""
        del source  # neither labels nor the number of images matter
        return BarlowTwins(self, encoder)


class BarlowTwins(Projected):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.loss = BarlowTwinsLoss(config.off_diagonal)

    def embed(self, batch: Batch) -> Embeddings:
        """Both views' projections."""
        first, second = through(self.project, batch.views)
        return {"first": first, "second": second}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Over the rows of all processes: mean and deviation of a feature belong to the whole batch."""
        del batch
        first, second = embeddings["first"], embeddings["second"]
        with torch.autocast(first.device.type, enabled=False):
            return StepOutput(self.loss(gather_rows(precise(first)), gather_rows(precise(second))))
