"""SupCon: all images of a class attract each other. It reads labels: the bound that the others are measured against.

    ℓ(i) = −mean_{p in P(i)} log( exp(zᵢ·zₚ ÷ τ) ÷ Σ_{j≠i} exp(zᵢ·zⱼ ÷ τ) )

with P(i) all other rows of i's class; an image without a label has its other view alone.

When to use: as a bound in comparisons, or where all images have labels. Khosla et al. 2020, arXiv 2004.11362,
equation 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Task
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext import simclr


class SupCon(simclr.SimCLR):
    """See :class:`Config`."""

    reads_labels: ClassVar[bool] = True

    def positives(self, batch: Batch) -> Tensor:
        """The classes; an image without a label (-1) has its other view alone."""
        assert batch.label is not None
        return torch.where(batch.label >= 0, batch.label, -2 - batch.index)


class Config(simclr.Config):
    """Supervised contrastive learning (Khosla et al. 2020), the form with the mean outside of the logarithm."""

    task = SupCon

    def build(self, encoder: Encoder, source: ImageDataset) -> Task:
        if source.classes is None:
            raise ConfigError(
                f"`pretext=supcon` reads labels, and {source.name} has none: take a task without labels, such as simclr."
            )
        return super().build(encoder, source)
