"""RetinaNet's parts of torchvision over an encoder's maps (Lin et al. 2017, focal loss)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ssl_pipeline.models.detector import Width, of_pyramid

_ANCHOR = 4  # the smallest anchor's side, in pixels of its level
_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
_RATIOS = (0.5, 1.0, 2.0)


class PyramidRetinaNetHead(nn.Module):
    """Feature pyramid, and at each place of it the classes and boxes of nine anchors; the maps are the encoder's.

    Args:
        widths: channels of each level, from fine to coarse.
        strides: the image's pixels per pixel of each level.
        classes: number of classes.
        width: channels of the pyramid.
        options: others of torchvision's ``RetinaNet``.
    """

    def __init__(
        self, widths: dict[str, int], strides: dict[str, int], classes: int, width: int, **options: float
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(widths.values()), width, extra_blocks=LastLevelMaxPool())
        coarse = list(strides.values())
        # A transformer's one level has to see small and large objects, too.
        steps = _OCTAVES if len(coarse) > 1 else (0.5, 1.0, 2.0)
        sizes = tuple(tuple(int(_ANCHOR * stride * step) for step in steps) for stride in (*coarse, 2 * coarse[-1]))
        anchors = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
        head = RetinaNetHead(width, len(steps) * len(_RATIOS), classes)
        for tower in (head.classification_head.conv, head.regression_head.conv):
            for layer in tower.modules():
                if isinstance(
                    layer, nn.Conv2d
                ):  # their own start, 0.01, fits 256 channels: narrower towers pass nothing on
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.whole: Any = RetinaNet(Width(width), classes, anchor_generator=anchors, head=head, **options)

    def losses(self, maps: dict[str, Tensor], size: int, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The two losses of training, by name; arguments as :class:`FasterRCNNHead` has them."""
        levels, images = of_pyramid(self.pyramid, maps, size)
        found = self.whole.head(levels)
        losses: dict[str, Tensor] = self.whole.compute_loss(targets, found, self.whole.anchor_generator(images, levels))
        return losses

    def detect(self, maps: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` (n, 4) in its pixels, ``labels`` (n,) from 0 and ``scores`` (n,), best first."""
        levels, images = of_pyramid(self.pyramid, maps, size)
        anchors = self.whole.anchor_generator(images, levels)
        each = self.whole.anchor_generator.num_anchors_per_location()
        counts = [level.shape[2] * level.shape[3] * n for level, n in zip(levels, each, strict=True)]
        found = {name: list(rows.split(counts, 1)) for name, rows in self.whole.head(levels).items()}
        split = [list(rows.split(counts)) for rows in anchors]
        detected: list[dict[str, Tensor]] = self.whole.postprocess_detections(found, split, images.image_sizes)
        return detected
