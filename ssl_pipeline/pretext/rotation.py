"""Rotation prediction: by which quarter turn was the image rotated?

    ℓ = −¼ Σ_{r=0…3} log p(r | x turned by r · 90°)

When to use: to learn how pretext tasks work, and where images have an upright; never where they have none (cells,
aerial images). Gidaris et al. 2018, arXiv 1803.07728, equations 2 and 3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Embeddings, PretextConfig, StepOutput, Task
from ssl_pipeline.losses.info_nce import to_float32
from ssl_pipeline.models.encoder import Encoder


class Config(PretextConfig):
    """Rotation prediction (Gidaris et al. 2018): the pretext task in its purest form, a label made of the image itself."""

    views_needed: ClassVar[int | None] = None

    def build(self, encoder: Encoder, source: ImageDataset) -> Rotation:
        return Rotation(encoder)


class Rotation(Task):
    """See :class:`Config`. Each view is seen in all four turns, as in the paper."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, 4)

    def embed(self, batch: Batch) -> Embeddings:
        """Logits of the four answers for each of the four turns of each view, (B, turns · views, 4)."""
        images = torch.cat(batch.views)
        turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
        logits = self.head(self.encoder.features(turned))
        return {"logits": logits.reshape(-1, len(batch.index), 4).transpose(0, 1)}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        logits = to_float32(embeddings["logits"])
        turns = torch.arange(4, device=logits.device).repeat_interleave(len(batch.views)).expand(logits.shape[:2])
        accuracy = (logits.detach().argmax(2) == turns).float().mean()
        return StepOutput(F.cross_entropy(logits.flatten(0, 1), turns.flatten()), {"accuracy": accuracy})
