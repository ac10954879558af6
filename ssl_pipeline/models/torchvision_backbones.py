"""What each family of torchvision's networks is inside: where its levels end, how wide they are, what is cut off; and our small ResNet.

Widths and strides are read from the modules' own attributes. No image is ever sent through a network to find them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VGG, ConvNeXt, EfficientNet, MobileNetV2, MobileNetV3, ResNet, SwinTransformer
from torchvision.models.resnet import BasicBlock

from ssl_pipeline.config.base import ConfigError

Layers = tuple[tuple[str, ...], ...]
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
    """A ResNet that a laptop's CPU can pretrain: a 3×3 stem and four stages of one ``BasicBlock``, of widths w, 2w, 4w and 8w.

    Args:
        width: of the first stage.
        stem_stride: 2 sees a quarter of the pixels, and pays for a network twice as wide.
    """

    def __init__(self, width: int = 16, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(width, width))
        self.layer2 = self._halving(width)
        self.layer3 = self._halving(2 * width)
        self.layer4 = self._halving(4 * width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _halving(width: int) -> nn.Sequential:
        """Twice the channels at half the resolution."""
        convolution = _SlicedConv2d if width < _FEWEST_CHANNELS else nn.Conv2d
        shortcut = nn.Sequential(convolution(width, 2 * width, 1, stride=2, bias=False), nn.BatchNorm2d(2 * width))
        return nn.Sequential(BasicBlock(width, 2 * width, 2, shortcut))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to pooled features (B, 8w)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)


@dataclass(frozen=True)
class FeatureLevel:
    """A level of the feature pyramid: the modules after the level before, its channels, and the image's pixels per pixel of it."""

    modules: tuple[str, ...]
    width: int
    stride: int


@dataclass(frozen=True)
class FeatureInfo:
    """What a network without its classifier is inside.

    Attributes:
        levels: from fine to coarse; the last is what a neck reads.
        classifier: prefixes of the classifier's keys in the library's state dict, which are cut off.
        final_norm: name of the module that the library applies after pooling, if it has one.
        norm_reads_rows: whether that module takes (B, D), rather than (B, D, 1, 1).
        channels_last: whether the modules take and give (B, H, W, C).
        token: whether there is a class token.
        taps: of timm's networks, the places in ``feature_info`` of all levels but the last.
        layers: for layer-wise learning rates, from the image on: the stem or embeddings, then a block each. A layer is the
            names of its modules and parameters; what is in none of them (a final norm) goes with the head.
    """

    levels: dict[str, FeatureLevel]
    classifier: tuple[str, ...]
    final_norm: str | None = None
    norm_reads_rows: bool = False
    channels_last: bool = False
    token: bool = False
    taps: tuple[int, ...] = ()
    layers: Layers = ()


def torchvision_names() -> list[str]:
    """Torchvision's image classifiers; its detectors would download weights when they are built."""
    names: list[str] = models.list_models(module=models)
    return names


def _named(levels: list[FeatureLevel]) -> dict[str, FeatureLevel]:
    """The coarsest level is c5, whatever the stem: the names detection heads know."""
    return {f"c{5 - len(levels) + 1 + i}": level for i, level in enumerate(levels)}


def _stride(module: Any) -> int:
    """The product of the strides along a chain of blocks: of a block's convolutions only one strides."""
    shortcuts = {
        id(c) for b in module.modules() if hasattr(b, "downsample") and b.downsample for c in b.downsample.modules()
    }
    return math.prod(m.stride[0] for m in module.modules() if isinstance(m, nn.Conv2d) and id(m) not in shortcuts)


def _blocks_of(network: nn.Module, *stages: str) -> Layers:
    """Each block of each stage as a layer."""
    return tuple((f"{s}.{name}",) for s in stages for name, _ in network.get_submodule(s).named_children())


def _resnet(network: Any) -> FeatureInfo:
    pool = getattr(network, "maxpool", None)
    stem = ("conv1", "bn1", "relu", *(("maxpool",) if pool is not None else ()))
    stride = network.conv1.stride[0] * (2 if isinstance(pool, nn.MaxPool2d) else 1)
    stages, levels = [f"layer{i}" for i in range(1, 5)], list[FeatureLevel]()
    for name in stages:
        stage = network.get_submodule(name)
        stride *= _stride(stage)
        out = [m for m in stage[-1].children() if isinstance(m, nn.Conv2d)][-1]
        levels.append(FeatureLevel((*(stem if not levels else ()), name), out.out_channels, stride))
    return FeatureInfo(_named(levels), ("fc.",), layers=(stem, *_blocks_of(network, *stages)))


def _vgg(network: Any) -> FeatureInfo:
    levels, modules, width = list[FeatureLevel](), list[str](), 0
    layers = list[tuple[str, ...]]()
    for name, module in network.features.named_children():
        modules.append(f"features.{name}")
        if isinstance(module, nn.Conv2d):
            width = module.out_channels
            layers.append(())
        layers[-1] += (f"features.{name}",)
        if isinstance(module, nn.MaxPool2d):
            levels.append(FeatureLevel(tuple(modules), width, 2 ** (len(levels) + 1)))
            modules = []
    return FeatureInfo(_named(levels), ("classifier.",), layers=tuple(layers))


def _pairs(network: Any, width_of: Callable[[Any], Tensor]) -> tuple[dict[str, FeatureLevel], Layers]:
    """Levels and layers of ConvNeXt and Swin: an embedding or a merge, then a stage of blocks, four times.

    A merge is in the layer of the block after it.
    """
    stride, levels = network.features[0][0].stride[0], []
    layers: list[tuple[str, ...]] = [("features.0",)]
    for i in range(4):
        merge, stage = f"features.{2 * i}", f"features.{2 * i + 1}"
        width = len(width_of(network.get_submodule(stage)[-1]))
        levels.append(FeatureLevel((merge, stage), width, stride * 2**i))
        first, *others = _blocks_of(network, stage)
        layers += [(*((merge,) if i else ()), *first), *others]
    return _named(levels), tuple(layers)


def _convnext(network: Any) -> FeatureInfo:
    levels, layers = _pairs(network, lambda block: block.layer_scale)
    return FeatureInfo(levels, ("classifier.2.",), "classifier", layers=layers)


def _swin(network: Any) -> FeatureInfo:
    levels, layers = _pairs(network, lambda block: block.norm1.weight)
    levels["c5"] = replace(levels["c5"], modules=(*levels["c5"].modules, "norm"))
    return FeatureInfo(levels, ("head.",), channels_last=True, layers=layers)


def _mobile(network: Any) -> FeatureInfo:
    """EfficientNet and MobileNet: a chain of blocks; a level ends where the next block strides."""
    levels, modules, stride, width = [], list[str](), 1, 0
    layers = list[tuple[str, ...]]()
    for child, module in network.features.named_children():
        name, is_stage = f"features.{child}", type(module) is nn.Sequential
        layers += _blocks_of(network, name) if is_stage else [(name,)]
        step = _stride(module)
        if step > 1 and modules:
            levels.append(FeatureLevel(tuple(modules), width, stride))
            modules = []
        modules.append(name)
        stride *= step
        width = int((module[-1] if is_stage else module).out_channels)
    levels.append(FeatureLevel(tuple(modules), width, stride))
    *layers, block, widening = layers  # the convolution after the last block is no layer of its own
    return FeatureInfo(_named(levels), ("classifier.",), layers=(*layers, block + widening))


def _vit(network: Any) -> FeatureInfo:
    level = FeatureLevel((), int(network.hidden_dim), int(network.patch_size))
    embeddings = ("class_token", "conv_proj", "encoder.pos_embedding")
    return FeatureInfo(
        {"c5": level}, ("heads.",), token=True, layers=(embeddings, *_blocks_of(network, "encoder.layers"))
    )


_FAMILIES: dict[type[nn.Module], Callable[[nn.Module], FeatureInfo]] = {
    ResNet: _resnet, SmallResNet: _resnet, VGG: _vgg, ConvNeXt: _convnext, SwinTransformer: _swin, EfficientNet: _mobile,
    MobileNetV2: _mobile, MobileNetV3: _mobile, models.VisionTransformer: _vit,
}  # fmt: skip


def feature_info(network: nn.Module, name: str) -> FeatureInfo:
    """The levels of a torchvision network, whose name is for messages.

    Raises:
        ConfigError: its family is not known here.
    """
    if type(network) not in _FAMILIES:
        raise ConfigError(
            f"`backbone.name`: {name} is of a torchvision family without feature maps here (known: ResNet, VGG, "
            "ConvNeXt, ViT, Swin, EfficientNet, MobileNet). timm has most others: backbone.name=timm/NAME."
        )
    return _FAMILIES[type(network)](network)


def remove_classifier(network: nn.Module, info: FeatureInfo) -> None:
    """Removes what only the library's own classes need, in place; all other keys keep the library's names."""
    for prefix in info.classifier:
        owner, _, child = prefix.rstrip(".").rpartition(".")
        if owner:  # ConvNeXt: the classifier's norm stays, its linear layer goes
            layers = list(network.get_submodule(owner).children())
            setattr(network, owner, nn.Sequential(*layers[: int(child)]))
        elif hasattr(network, child):
            setattr(network, child, nn.Identity())


def shrink_stem(network: nn.Module) -> bool:
    """Gives a network a stem for small images, in place: 3×3 with stride 1, no max-pool. False if its family has none."""
    if isinstance(network, ResNet):
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    elif isinstance(network, EfficientNet | MobileNetV2 | MobileNetV3):
        first_convolution(network)[1].stride = (1, 1)
    return isinstance(network, SmallResNet | VGG | ResNet | EfficientNet | MobileNetV2 | MobileNetV3)


def adapt_input_conv(network: nn.Module, channels: int) -> str:
    """Fits the first convolution to another number of channels, in place; a note for the log.

    The kernels' sum, shared evenly: an image whose channels are all alike gives what its RGB form gave.
    """
    name, stem = first_convolution(network)
    like: Any = stem
    fitted = type(like)(  # timm's convolutions with TensorFlow's padding are of a class of their own
        channels, like.out_channels, like.kernel_size, like.stride, like.padding, like.dilation, bias=like.bias is not None
    )  # fmt: skip
    with torch.no_grad():
        summed = stem.weight.sum(1, keepdim=True) / channels
        fitted.weight.copy_(summed.expand(-1, channels, -1, -1))
        if stem.bias is not None:
            fitted.bias.copy_(stem.bias)
    network.set_submodule(name, fitted)
    return f"backbone: the stem's kernels were summed for images with {channels} channel(s)"


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that sees the images, and its name."""
    return next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
