"""DANN: features from which a discriminator can't predict the domain."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.domain.method import JointConfig, JointTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings
from ssl_pipeline.schedules import TrainProgress


def ramp(clock: TrainProgress, gamma: float) -> float:
    """From 0 to nearly 1: what the reversed gradient is multiplied by at a step."""
    return 2 / (1 + math.exp(-gamma * clock.step / clock.total)) - 1


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by −strength."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(rows: Tensor, strength: float) -> Tensor:
    """The rows, whose gradient comes back multiplied by −strength."""
    reversed_rows: Tensor = _Reverse.apply(rows, strength)
    return reversed_rows


class DANN(JointTask):
    """See :class:`Config`."""

    config: Config

    def __init__(self, config: Config, classifier: Classification) -> None:
        super().__init__(config, classifier)
        width = config.hidden_width
        self.discriminator = nn.Sequential(nn.Linear(classifier.width, width), nn.ReLU(), nn.Linear(width, 1))

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        """The discriminator's cross-entropy; it learns at full strength, the features by the reversed, ramped gradient."""
        rows = torch.cat([source["features"], target["features"]])
        logits = self.discriminator(reverse_gradient(rows, ramp(batch.clock, self.config.gamma)))[:, 0]
        is_source = torch.arange(len(rows), device=rows.device) < len(source["features"])
        return F.binary_cross_entropy_with_logits(logits.float(), is_source.float())


class Config(JointConfig):
    r"""Domain-adversarial training (Ganin et al. 2016), with the paper's ramp.

    .. math:: \lambda(p) = \frac{2}{1 + e^{-\gamma p}} - 1, \qquad p = \text{step} / \text{total}

    Attributes:
        gamma: how steep the ramp is.
        hidden_width: of the discriminator.
    """

    task = DANN
    gamma: float = Field(10.0, gt=0)
    hidden_width: int = Field(256, ge=1)
