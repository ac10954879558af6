"""A ResNet that a laptop's CPU can pretrain: one residual block a stage, narrow, made of torchvision's parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

_FEWEST_CHANNELS = 8  # that oneDNN's kernel for strided 1×1 convolutions has room for


class _SlicedConv2d(nn.Conv2d):
    """A 1×1 convolution that slices its input by the stride, to the same result.

    With a stride, fewer than 8 channels and the layout channels_last, oneDNN without AVX-512 writes past the end of its memory when it
    computes the weight's gradient: wrong values at best, else a crash (uxlfoundation/oneDNN#6035).
    """

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.stride
        return nn.functional.conv2d(images[:, :, ::rows, ::columns], self.weight)


class SmallResNet(nn.Module):
    """A 3×3 stem and four stages of one ``BasicBlock``, of widths w, 2w, 4w and 8w and strides 1, 2, 2 and 2.

    Args:
        width: of the first stage.
        stem_stride: 2 sees a quarter of the pixels, and pays for a network twice as wide.
    """

    def __init__(self, width: int = 16, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(entering: int, leaving: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1 or entering != leaving:
            convolution = _SlicedConv2d if entering < _FEWEST_CHANNELS else nn.Conv2d
            shortcut = nn.Sequential(
                convolution(entering, leaving, 1, stride=stride, bias=False), nn.BatchNorm2d(leaving)
            )
        return nn.Sequential(BasicBlock(entering, leaving, stride, shortcut))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to pooled features (B, 8w)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
