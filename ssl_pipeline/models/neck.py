"""The neck: between backbone and head, it makes one row of features of the backbone's maps."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.models.backbone import Backbone


class NeckConfig(FrozenModel):
    """How maps become features.

    Attributes:
        name: ``gap``: global average pooling of the last level. ``gem``: generalized-mean pooling (Radenović et al. 2019).
            ``tokens``: a vision transformer's class token. ``multi_level``: global average pooling of all levels, side by side.
        power: where GeM's learned power starts.
    """

    short_for: ClassVar[str | None] = "name"
    name: Literal["gap", "gem", "tokens", "multi_level"] = "gap"
    power: float = Field(3.0, gt=0)


class GAP(nn.Module):
    """Global average pooling: a channel becomes its mean. ``{level: (B, D, H, W)}`` to (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        pooled: Tensor = self.pool(maps["c5"])
        return pooled.flatten(1)


class GeM(nn.Module):
    """Generalized-mean pooling: between the mean (power 1) and the maximum (power ∞), learned."""

    def __init__(self, width: int, power: float) -> None:
        super().__init__()
        self.width = width
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """The last level's generalized means, (B, D)."""
        positive = maps["c5"].float().clamp_min(1e-6)
        return positive.pow(self.power).mean((2, 3)).pow(1 / self.power)


class Tokens(nn.Module):
    """A vision transformer's class token, (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return maps["token"]


class MultiLevel(nn.Module):
    """Global average pooling of all levels, concatenated: (B, sum of widths)."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.levels = tuple(widths)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return torch.cat([maps[level].mean((2, 3)) for level in self.levels], 1)


def build_neck(config: NeckConfig, backbone: Backbone) -> GAP | GeM | Tokens | MultiLevel:
    """The neck of a backbone; its ``width`` is the number of features."""
    last = list(backbone.widths.values())[-1]
    if config.name == "gem":
        return GeM(last, config.power)
    if config.name == "multi_level":
        return MultiLevel(backbone.widths)
    if config.name == "tokens":
        if not backbone.has_token:
            raise ConfigError(
                "`neck.name=tokens` needs a vision transformer; this backbone has no class token: take gap."
            )
        return Tokens(last)
    return GAP(last)
