"""What most pretext tasks share: an encoder with a projection head, and several views through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from lightly.loss import NegativeCosineSimilarity
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Embeddings, PretextConfig, StepOutput, Task
from ssl_pipeline.losses.gather import all_gather_rows
from ssl_pipeline.losses.info_nce import to_float32
from ssl_pipeline.losses.temperature import Temperature, TemperatureConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import projection_head


class ProjectionConfig(PretextConfig):
    """The size of the projection head.

    Attributes:
        hidden_width: of the projection head.
        projection_width: where the loss is taken.
        layers: of the projection head.
        task: the class of the task.
    """

    task: ClassVar[Callable[..., Task]]
    hidden_width: int = Field(2048, ge=1)
    projection_width: int = Field(128, ge=2)
    layers: int = Field(2, ge=1)

    def build(self, encoder: Encoder, source: ImageDataset) -> Task:
        return self.task(self, encoder)


class ContrastiveConfig(ProjectionConfig):
    """Of the tasks with a temperature.

    Attributes:
        temperature: of InfoNCE.
        contrasts_with: the keys of InfoNCE where they have no domains: a temperature per domain is refused.
    """

    contrasts_with: ClassVar[str | None] = None
    temperature: TemperatureConfig = TemperatureConfig()

    def check_domains(self, has_domains: bool) -> None:
        """Raises a ConfigError for a temperature per domain where there are no domains."""
        if self.temperature.other_domain is not None and self.contrasts_with is not None:
            raise ConfigError(
                f"`pretext.temperature.other_domain` has no meaning for {self.contrasts_with}: use simclr."
            )
        if self.temperature.other_domain is not None and not has_domains:
            raise ConfigError(
                "`pretext.temperature.other_domain` needs images with domains, and this data has none: set it to null, or take a "
                "source with domains."
            )

    def build(self, encoder: Encoder, source: ImageDataset) -> Task:
        self.check_domains(source.has_domains)
        return super().build(encoder, source)


class ProjectionTask(Task):
    """An encoder with a projection head, which is dropped after stage one, and the temperature of a contrastive task.

    Args:
        config: the head's size, and the temperature.
        encoder: what is pretrained.
        norm: whether batch norms stand between the head's layers.
        final_norm: whether one follows the last.
    """

    config: ProjectionConfig
    temperature: Temperature

    def __init__(self, config: ProjectionConfig, encoder: Encoder, norm: bool = True, final_norm: bool = False) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projection = projection_head(
            encoder.width, config.hidden_width, config.projection_width, config.layers, norm=norm, final_norm=final_norm
        )
        if isinstance(config, ContrastiveConfig):
            self.temperature = Temperature(config.temperature)

    def project(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to projections (B, projection_width)."""
        projections: Tensor = self.projection(self.encoder.features(images))
        return projections

    def embed(self, batch: Batch) -> Embeddings:
        return {f"view {i}": rows for i, rows in enumerate(forward_views(self.project, batch.views))}

    def student(self) -> nn.Sequential:
        """Encoder and head as one network, for a teacher to copy and to follow."""
        return nn.Sequential(self.encoder, self.projection)


class BatchStatisticsTask(ProjectionTask):
    """Two views, and a ``loss`` between their rows (N, D) of all processes: its statistics are those of the whole batch."""

    def __init__(self, config: ProjectionConfig, encoder: Encoder, loss: nn.Module) -> None:
        super().__init__(config, encoder)
        self.loss = loss

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        with torch.autocast(batch.index.device.type, enabled=False):
            return StepOutput(self.loss(*(all_gather_rows(to_float32(rows)) for rows in embeddings.values())))


def with_predictions(projections: Sequence[Tensor], predictor: nn.Module) -> Embeddings:
    """Two views' projections, and what a predictor makes of them as one batch."""
    predictions = predictor(torch.cat(list(projections))).chunk(2)
    return {
        "projection 0": projections[0], "projection 1": projections[1],
        "prediction 0": predictions[0], "prediction 1": predictions[1],
    }  # fmt: skip


def cosine_loss(embeddings: Embeddings, target: str) -> StepOutput:
    """The mean negative cosine of each view's prediction and the other view's ``target``, whose gradient is stopped."""
    with torch.autocast(embeddings["prediction 0"].device.type, enabled=False):
        predictions = [to_float32(embeddings[f"prediction {i}"]) for i in (0, 1)]
        targets = [to_float32(embeddings[f"{target} {i}"].detach()) for i in (1, 0)]
        return StepOutput(torch.stack(list(map(NegativeCosineSimilarity(), predictions, targets))).mean())


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
