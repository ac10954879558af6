"""Heads that read feature maps: a class for every pixel, or boxes.

Boxes are found by torchvision's detectors over an encoder's maps: Faster R-CNN (Ren et al. 2015; Lin et al. 2017) and RetinaNet (Lin
et al. 2017).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

_RATIOS = (0.5, 1.0, 2.0)
_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
# The paper's rates for its map of 65 pixels, stride 8 of 513; 6, 12 and 18 at stride 16 are the same shares of 33.
_ATROUS_SHARES = (12 / 65, 24 / 65, 36 / 65)


class SkipHead(nn.Module):
    """Scores on every level, summed from coarse to fine (Long et al. 2015); ``widths`` are of each level, from fine to coarse."""

    def __init__(self, widths: dict[str, int], classes: int) -> None:
        super().__init__()
        # The levels differ in scale: without a norm the largest values would have all the say.
        scores = {name: nn.Sequential(nn.BatchNorm2d(w), nn.Conv2d(w, classes, 1)) for name, w in widths.items()}
        self.scores = nn.ModuleDict(scores)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """A map (B, width, …) per level to (B, classes, h, w) of the finest one's size."""
        coarse_to_fine: list[Tensor] = [score(maps[level]) for level, score in reversed(list(self.scores.items()))]
        total, *finer = coarse_to_fine
        for own in finer:
            total = own + F.interpolate(total, own.shape[2:], mode="bilinear", align_corners=False)
        return total


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


class _DetectionHead(nn.Module):
    """A feature pyramid of ``width`` channels with anchors on its levels, whose lowest is the encoder's finest."""

    def __init__(self, widths: dict[str, int], width: int) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(widths.values()), width, extra_blocks=LastLevelMaxPool())

    def levels(self, maps: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], ImageList]:
        """The pyramid's levels by name, from fine to coarse, and the images, of which torchvision's parts only read the size."""
        first = next(iter(maps.values()))
        shape = first.new_empty(1).expand(len(first), 3, size, size)
        return self.pyramid(maps), ImageList(shape, [(size, size)] * len(first))


class FasterRCNNHead(_DetectionHead):
    """Feature pyramid, proposals and box head.

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
        super().__init__(widths, width)
        coarse = list(strides.values())
        sides = [8 * stride for stride in (*coarse, 2 * coarse[-1])]
        # A transformer's one level has to see small and large objects, too.
        sizes = [(side,) for side in sides] if len(coarse) > 1 else [(sides[0] // 4, sides[0] // 2, sides[0])] * 2
        anchors = AnchorGenerator(tuple(sizes), (_RATIOS,) * len(sizes))
        pool = MultiScaleRoIAlign(list(widths), output_size=7, sampling_ratio=2)
        whole: Any = FasterRCNN(
            _BackboneStub(width), rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=TwoMLPHead(width * 49, hidden),
            box_predictor=_BoxPredictor(hidden, classes + 1), **options,
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
        levels, images = self.levels(maps, size)
        proposals, proposing = self.rpn(images, levels, shifted)
        _, deciding = self.roi_heads(levels, proposals, images.image_sizes, shifted)
        losses: dict[str, Tensor] = {**proposing, **deciding}
        return losses

    def detect(self, maps: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` (n, 4) in its pixels, ``labels`` (n,) from 0 and ``scores`` (n,), best first."""
        levels, images = self.levels(maps, size)
        proposals, _ = self.rpn(images, levels)
        found, _ = self.roi_heads(levels, proposals, images.image_sizes)
        return [{**one, "labels": one["labels"] - 1} for one in found]


class PyramidRetinaNetHead(_DetectionHead):
    """Feature pyramid, and at each place of it the classes and boxes of nine anchors; arguments as of :class:`FasterRCNNHead`."""

    def __init__(
        self, widths: dict[str, int], strides: dict[str, int], classes: int, width: int, **options: float
    ) -> None:
        super().__init__(widths, width)
        coarse = list(strides.values())
        # A transformer's one level has to see small and large objects, too.
        steps = _OCTAVES if len(coarse) > 1 else (0.5, 1.0, 2.0)
        sizes = tuple(tuple(int(4 * stride * step) for step in steps) for stride in (*coarse, 2 * coarse[-1]))
        anchors = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
        head = RetinaNetHead(width, len(steps) * len(_RATIOS), classes)
        # Their own start, of deviation 0.01, fits 256 channels: narrower towers pass nothing on.
        for tower in (head.classification_head.conv, head.regression_head.conv):
            for layer in tower.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.whole: Any = RetinaNet(_BackboneStub(width), classes, anchor_generator=anchors, head=head, **options)

    def losses(self, maps: dict[str, Tensor], size: int, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The two losses of training, by name; arguments as of :meth:`FasterRCNNHead.losses`."""
        _, anchors, found = self._anchored(maps, size)
        losses: dict[str, Tensor] = self.whole.compute_loss(targets, found, anchors)
        return losses

    def detect(self, maps: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        """As :meth:`FasterRCNNHead.detect`."""
        levels, anchors, heads = self._anchored(maps, size)
        each = self.whole.anchor_generator.num_anchors_per_location()
        counts = [level.shape[2] * level.shape[3] * n for level, n in zip(levels, each, strict=True)]
        found = {name: list(rows.split(counts, 1)) for name, rows in heads.items()}
        split, sizes = [list(rows.split(counts)) for rows in anchors], [(size, size)] * len(anchors)
        detected: list[dict[str, Tensor]] = self.whole.postprocess_detections(found, split, sizes)
        return detected

    def _anchored(self, maps: dict[str, Tensor], size: int) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        named, images = self.levels(maps, size)
        levels = list(named.values())
        return levels, self.whole.anchor_generator(images, levels), self.whole.head(levels)


class _BackboneStub(nn.Module):
    """A backbone that is never run: torchvision's detectors only read its width."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


class _BoxPredictor(nn.Module):
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
