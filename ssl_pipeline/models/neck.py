"""The neck: between backbone and head, it makes one row of features of the backbone's maps."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
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


class Neck(nn.Module):
    """Maps ``{level: (B, D, H, W)}`` to features (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class GAP(Neck):
    """Global average pooling: a channel of the last level becomes its mean."""

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return F.adaptive_avg_pool2d(maps["c5"], 1).flatten(1)


class GeM(Neck):
    """Generalized-mean pooling of the last level: between the mean (power 1) and the maximum (power ∞), learned."""

    def __init__(self, width: int, power: float) -> None:
        super().__init__(width)
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        positive = maps["c5"].float().clamp_min(1e-6)
        return positive.pow(self.power).mean((2, 3)).pow(1 / self.power)


class Tokens(Neck):
    """A vision transformer's class token."""

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return maps["token"]


class MultiLevel(Neck):
    """Global average pooling of all levels, side by side."""

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return torch.cat([one.mean((2, 3)) for level, one in maps.items() if level != "token"], 1)


def build_neck(config: NeckConfig, backbone: Backbone) -> Neck:
    """The neck of a backbone; its ``width`` is the number of features."""
    if config.name == "multi_level":
        return MultiLevel(sum(backbone.widths.values()))
    last = list(backbone.widths.values())[-1]
    if config.name == "gem":
        return GeM(last, config.power)
    if config.name == "tokens":
        if not backbone.has_token:
            raise ConfigError(
                "`neck.name=tokens` needs a vision transformer; this backbone has no class token: take gap."
            )
        return Tokens(last)
    return GAP(last)
