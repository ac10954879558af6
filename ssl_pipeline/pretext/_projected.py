"""What most pretext tasks share: an encoder with a projection head behind it, and several views through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, PretextConfig, StepOutput, Task
from ssl_pipeline.losses.gather import all_gather_rows
from ssl_pipeline.losses.info_nce import to_float32
from ssl_pipeline.losses.temperature import Temperature, TemperatureConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.head import projection_head


class ProjectedConfig(PretextConfig):
    """The projection head's measures, common to the tasks that have one.

    Attributes:
        hidden_width: of the projection head.
        projection_width: where the loss is taken.
        layers: of the projection head.
    """

    hidden_width: int = Field(2048, ge=1)
    projection_width: int = Field(128, ge=2)
    layers: int = Field(2, ge=1)


class ContrastiveConfig(ProjectedConfig):
    """Of the tasks with a temperature.

    Attributes:
        temperature: of InfoNCE.
    """

    temperature: TemperatureConfig = TemperatureConfig()

    def check_domains(self, known: bool) -> None:
        """A temperature per domain needs domains.

        Raises:
            ConfigError: the source has none.
        """
        if self.temperature.other_domain is not None and not known:
            raise ConfigError(
                "`pretext.temperature.other_domain` needs images with domains, and this data has none: set it to null, or take a "
                "source with domains."
            )


class ProjectionTask(Task):
    """An encoder with a projection head, which is thrown away after stage one.

    Args:
        config: the head's measures.
        encoder: what is pretrained.
        norm: whether batch norms stand between the head's layers.
        final_norm: whether one follows the last.
    """

    def __init__(self, config: ProjectedConfig, encoder: Encoder, norm: bool = True, final_norm: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection_head(
            encoder.width, config.hidden_width, config.projection_width, config.layers, norm=norm, final_norm=final_norm
        )

    def project(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to projections (B, projection_width)."""
        projections: Tensor = self.projection(self.encoder.features(images))
        return projections

    def student(self) -> nn.Sequential:
        """Encoder and head as one network, for a teacher to copy and to follow."""
        return nn.Sequential(self.encoder, self.projection)


class Contrastive(ProjectionTask):
    """A projected task with a temperature, which stays within its bounds."""

    def __init__(
        self, config: ContrastiveConfig, encoder: Encoder, norm: bool = True, final_norm: bool = False
    ) -> None:
        super().__init__(config, encoder, norm, final_norm)
        self.temperature = Temperature(config.temperature)


class BatchStatisticsTask(ProjectionTask):
    """Two views, and a loss between the rows of all processes: its statistics belong to the whole batch.

    Args:
        config: the head's measures.
        encoder: what is pretrained.
        loss: rows of both views (N, D) to a scalar.
    """

    def __init__(self, config: ProjectedConfig, encoder: Encoder, loss: nn.Module) -> None:
        super().__init__(config, encoder)
        self.loss = loss

    def embed(self, batch: Batch) -> Embeddings:
        """Both views' projections."""
        first, second = forward_views(self.project, batch.views)
        return {"first": first, "second": second}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """The loss in fp32 at least."""
        del batch
        first, second = embeddings["first"], embeddings["second"]
        with torch.autocast(first.device.type, enabled=False):
            return StepOutput(self.loss(all_gather_rows(to_float32(first)), all_gather_rows(to_float32(second))))


def with_predictions(projections: Sequence[Tensor], predictor: nn.Module) -> Embeddings:
    """Two views' projections, and what a predictor makes of them as one batch."""
    predictions = predictor(torch.cat(list(projections))).chunk(2)
    return {
        "projection 0": projections[0], "projection 1": projections[1],
        "prediction 0": predictions[0], "prediction 1": predictions[1],
    }  # fmt: skip


def forward_views(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Several views through a network, those of one size as one batch, so that BatchNorm sees them together.

    Args:
        network: images (N, C, H, W) to rows (N, D).
        views: each of shape (B, C, S, S), equal sizes side by side.

    Returns:
        Rows of shape (B, D) for each view.
    """
    rows: list[Tensor] = []
    for _, group in itertools.groupby(views, key=lambda view: view.shape[2:]):
        same = list(group)
        rows += network(torch.cat(same)).chunk(len(same))
    return rows
