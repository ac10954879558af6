"""The bottleneck: an output much narrower than the input, like a bottle's neck. Part of stage two, off by default."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pipeline.config.base import FrozenModel


class BottleneckConfig(FrozenModel):
    """A narrow layer between features and head.

    Attributes:
        width: 256 is customary where 1,024 or 2,048 features come in; null for none.
        norm: after the linear layer.
        activation: after the norm.
    """

    short_for: ClassVar[str | None] = "width"
    width: int | None = Field(None, ge=1)
    norm: Literal["batch", "layer", "none"] = "batch"
    activation: Literal["none", "relu", "gelu"] = "none"


def build_bottleneck(config: BottleneckConfig, in_width: int) -> tuple[nn.Module, int]:
    """The layer (B, in_width) to (B, width), and its width; the identity without a width."""
    if config.width is None:
        return nn.Identity(), in_width
    layers: list[nn.Module] = [nn.Linear(in_width, config.width)]
    if config.norm != "none":
        layers.append(nn.BatchNorm1d(config.width) if config.norm == "batch" else nn.LayerNorm(config.width))
    if config.activation != "none":
        layers.append(nn.ReLU() if config.activation == "relu" else nn.GELU())
    return nn.Sequential(*layers), config.width


@torch.no_grad()
def estimate_bottleneck(bottleneck: nn.Module, features: Tensor) -> None:
    """Sets the running statistics of a bottleneck's BatchNorm to those of its inputs, shape (N, in_width).

    A fresh BatchNorm has mean 0 and variance 1: a head fitted behind it would read features of another scale than in training, which
    normalizes by the batch.
    """
    was_training = bottleneck.training
    bottleneck.eval()
    rows = features
    for layer in bottleneck.children():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(rows.double().mean(0))
            # Of N − 1, as torch's own estimate.
            layer.running_var.copy_(rows.double().var(0, correction=min(1, len(rows) - 1)))
        rows = layer(rows)
    bottleneck.train(was_training)
