"""CORAL over sources: the same mean and covariance of the features in each pair of sources."""

from __future__ import annotations

from itertools import combinations

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.domain.losses import moments_loss
from ssl_pipeline.domain.method import GeneralizationConfig, SourceTask
from ssl_pipeline.engine.task import Embeddings, StepOutput


def pairwise_coral(features: Tensor, domain: Tensor) -> Tensor:
    """The mean of :func:`moments_loss` over the pairs of domains (B,) that have two rows (of (B, D)) or more; 0 without a pair."""
    parts = [features[domain == number] for number in domain.unique().tolist()]
    losses = [moments_loss(a, b) for a, b in combinations([part for part in parts if len(part) > 1], 2)]
    return torch.stack(losses).mean() if losses else features.sum() * 0


class CORALOverSources(SourceTask):
    """See :class:`Config`."""

    config: Config

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        output = super().objective(embeddings, batch)
        assert batch.domain is not None
        with torch.autocast(batch.domain.device.type, enabled=False):  # a covariance in bf16 has two digits
            term = pairwise_coral(embeddings["features"].float(), batch.domain)
        return StepOutput(output.loss + self.config.weight * term, output.metrics | {"term": term.detach()})


class Config(GeneralizationConfig):
    """CORAL as a generalization method: means and covariances of each pair of sources (Gulrajani and Lopez-Paz 2021).

    Attributes:
        weight: of the mean over the pairs of sources.
    """

    task = CORALOverSources
    weight: float = Field(1.0, ge=0)
