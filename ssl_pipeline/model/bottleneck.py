"""The bottleneck: an output much narrower than the input, like a bottle's neck. Part of stage two, off by default."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ssl_pipeline.config.base import Strict


class BottleneckConfig(Strict):
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
    """The bottleneck and what it leaves: (B, in_width) to (B, width); the identity without a width."""
    if config.width is None:
        return nn.Identity(), in_width
    layers: list[nn.Module] = [nn.Linear(in_width, config.width)]
    if config.norm != "none":
        layers.append(nn.BatchNorm1d(config.width) if config.norm == "batch" else nn.LayerNorm(config.width))
    if config.activation != "none":
        layers.append(nn.ReLU() if config.activation == "relu" else nn.GELU())
    return nn.Sequential(*layers), config.width
