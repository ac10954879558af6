"""SimCLR: two views of an image attract each other, and repel the views of all other images in the batch."""

from __future__ import annotations

import torch
from pydantic import Field

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.data.stream import Stream
from ssl_pipeline.engine.task import Embeddings, PretextConfig, StepOutput, Task
from ssl_pipeline.losses.info_nce import two_view_info_nce
from ssl_pipeline.losses.temperature import TemperatureConfig
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.model.head import projection_head


class Config(PretextConfig):
    """SimCLR (Chen et al. 2020).

    Attributes:
        temperature: of InfoNCE.
        hidden_width: of the projection head.
        projection_width: where the loss is taken.
        layers: of the projection head.
    """

    temperature: TemperatureConfig = TemperatureConfig()
    hidden_width: int = Field(2048, ge=1)
    projection_width: int = Field(128, ge=2)
    layers: int = Field(2, ge=1)

    def build(self, encoder: Encoder, source: Indexed | Stream) -> SimCLR:
        """The task around an encoder."""
        del source  # no label is read
        return SimCLR(self, encoder)


class SimCLR(Task):
    """See :class:`Config`. The projection head is thrown away after stage one."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = config.temperature
        self.projection = projection_head(encoder.width, config.hidden_width, config.projection_width, config.layers)

    def embed(self, batch: Batch) -> Embeddings:
        """Both views go through the network as one batch, so that BatchNorm sees both."""
        first, second = self.projection(self.encoder.features(torch.cat(batch.views))).chunk(2)
        return {"first": first, "second": second}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """InfoNCE over all processes' rows."""
        temperature = self.temperature.at(batch.clock)
        loss = two_view_info_nce(embeddings["first"], embeddings["second"], temperature)
        return StepOutput(loss, {"temperature": temperature})
