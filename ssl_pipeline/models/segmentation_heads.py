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


# The paper's rates for its map of 65 pixels, stride 8 of 513; 6, 12 and 18 at stride 16 are the same shares of 33.
_ATROUS_SHARES = (12 / 65, 24 / 65, 36 / 65)


class _Atrous(nn.Conv2d):
    """A 3×3 convolution whose taps are a share of the map's side apart, so that they are inside maps of any size and stride."""

    def __init__(self, in_width: int, out_width: int, share: float) -> None:
        super().__init__(in_width, out_width, 3, bias=False)
        self.share = share

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_width, h, w) to (B, out_width, h, w)."""
        rate = max(1, round(self.share * min(maps.shape[2:])))
        return F.conv2d(maps, self.weight, padding=rate, dilation=rate)


class DeepLab(nn.Module):
    """Atrous spatial pyramid pooling of the last level (Chen et al. 2017), of torchvision's parts.

    The published rates, 12, 24 and 36 pixels, are for maps of stride 8; at stride 32 only the middle tap would be inside the map. Here
    they are the same shares of the map, whatever its stride.

    Args:
        widths: channels of each level, from fine to coarse.
        classes: number of classes.
        hidden: channels between.
    """

    def __init__(self, widths: dict[str, int], classes: int, hidden: int = 256) -> None:
        super().__init__()
        *_, (self.level, width) = widths.items()
        hidden = min(hidden, width)
        pyramid = ASPP(width, [1] * len(_ATROUS_SHARES), hidden)
        for branch, share in zip(pyramid.convs[1:-1], _ATROUS_SHARES, strict=True):  # between a 1×1 and the pooled mean
            branch[0] = _Atrous(width, hidden, share)
        self.layers = nn.Sequential(
            pyramid,
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, classes, 1),
        )

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """A map (B, width, …) per level to (B, classes, h, w) of the last one's size."""
        scores: Tensor = self.layers(maps[self.level])
        return scores
