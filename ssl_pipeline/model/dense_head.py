"""Heads that read feature maps: a prediction for every pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP


class SkipHead(nn.Module):
    """Scores on every level, summed from coarse to fine (Long et al. 2015).

    Args:
        widths: channels of each level, from fine to coarse.
        classes: number of classes.
    """

    def __init__(self, widths: dict[str, int], classes: int) -> None:
        super().__init__()
        # The levels differ in scale: without a norm the largest values would have all the say.
        self.scores = nn.ModuleDict(
            {
                level: nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))
                for level, width in widths.items()
            }
        )

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """A map (B, width, …) per level to (B, classes, h, w) of the finest one's size."""
        total: Tensor | None = None
        for level in reversed(list(self.scores)):
            own: Tensor = self.scores[level](maps[level])
            total = (
                own
                if total is None
                else own + F.interpolate(total, own.shape[2:], mode="bilinear", align_corners=False)
            )
        assert total is not None
        return total


class DeepLab(nn.Module):
    """Atrous spatial pyramid pooling of the last level (Chen et al. 2017), of torchvision's parts.

    Args:
        widths: channels of each level, from fine to coarse.
        classes: number of classes.
        hidden: channels between.
    """

    def __init__(self, widths: dict[str, int], classes: int, hidden: int = 256) -> None:
        super().__init__()
        *_, (self.level, width) = widths.items()
        hidden = min(hidden, width)
        self.layers = nn.Sequential(
            ASPP(width, [12, 24, 36], hidden),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, classes, 1),
        )

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """A map (B, width, …) per level to (B, classes, h, w) of the last one's size."""
        scores: Tensor = self.layers(maps[self.level])
        return scores
