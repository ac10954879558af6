"""Faster R-CNN's parts of torchvision over an encoder's maps (Ren et al. 2015; Lin et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

_ANCHOR = 8  # an anchor's side, in pixels of its level
_RATIOS = (0.5, 1.0, 2.0)


class FasterRCNNHead(nn.Module):
    """Feature pyramid, proposals and box head; the maps are the encoder's.

    Args:
        widths: channels of each level, from fine to coarse.
        strides: the image's pixels per pixel of each level.
        classes: number of classes, without the background.
        width: channels of the pyramid.
        hidden: width of the box head.
        options: others of torchvision's ``FasterRCNN``.
    """

    def __init__(
        self, widths: dict[str, int], strides: dict[str, int], classes: int, width: int, hidden: int, **options: float
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(widths.values()), width, extra_blocks=LastLevelMaxPool())
        coarse = list(strides.values())
        sides = [_ANCHOR * stride for stride in (*coarse, 2 * coarse[-1])]
        # A transformer's one level has to see small and large objects, too.
        sizes = [(side,) for side in sides] if len(coarse) > 1 else [(sides[0] // 4, sides[0] // 2, sides[0])] * 2
        anchors = AnchorGenerator(tuple(sizes), (_RATIOS,) * len(sizes))
        pool = MultiScaleRoIAlign(list(widths), output_size=7, sampling_ratio=2)
        whole: Any = FasterRCNN(
            Width(width), rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=TwoMLPHead(width * 49, hidden),
            box_predictor=_Predictor(hidden, classes + 1), **options,
        )  # fmt: skip
        self.rpn, self.roi_heads = whole.rpn, whole.roi_heads

    def losses(self, maps: dict[str, Tensor], size: int, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The four losses of training, by name.

        Args:
            maps: a map (B, width, …) per level.
            size: height and width of the images in pixels.
            targets: per image ``boxes`` (n, 4) in its pixels, and ``labels`` (n,) from 0.
        """
        shifted = [{"boxes": one["boxes"], "labels": one["labels"] + 1} for one in targets]  # 0 is the background's
        pyramid, images = pyramid_and_images(self.pyramid, maps, size)
        proposals, proposing = self.rpn(images, pyramid, shifted)
        _, deciding = self.roi_heads(pyramid, proposals, images.image_sizes, shifted)
        losses: dict[str, Tensor] = {**proposing, **deciding}
        return losses

    def detect(self, maps: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` (n, 4) in its pixels, ``labels`` (n,) from 0 and ``scores`` (n,), best first."""
        pyramid, images = pyramid_and_images(self.pyramid, maps, size)
        proposals, _ = self.rpn(images, pyramid)
        found, _ = self.roi_heads(pyramid, proposals, images.image_sizes)
        return [{**one, "labels": one["labels"] - 1} for one in found]


def of_pyramid(pyramid: nn.Module, maps: dict[str, Tensor], size: int) -> tuple[list[Tensor], ImageList]:
    """A pyramid's levels from fine to coarse, and what torchvision's parts ask of images of a size."""
    levels, images = pyramid_and_images(pyramid, maps, size)
    return list(levels.values()), images


def pyramid_and_images(pyramid: nn.Module, maps: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], ImageList]:
    """The same, the levels by name."""
    first = next(iter(maps.values()))
    # Of the images themselves these parts read only how large they are.
    shape = first.new_empty(1).expand(len(first), 3, size, size)
    return pyramid(maps), ImageList(shape, [(size, size)] * len(first))


class Width(nn.Module):
    """What torchvision's detector asks of a backbone before it is used: how wide it is."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


class _Predictor(nn.Module):
    """Class scores, and a box a class; small at first, so that most proposals start as background (Girshick 2015)."""

    def __init__(self, in_width: int, classes: int) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(in_width, classes), nn.Linear(in_width, 4 * classes)
        for layer, std in ((self.scores, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, in_width) to (n, classes) and (n, 4·classes)."""
        return self.scores(torch.flatten(rows, 1)), self.boxes(torch.flatten(rows, 1))
