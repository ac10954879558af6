"""What each family of torchvision's networks looks like inside: where its levels end, how wide they are, what to cut off.

Widths and strides are read from the modules' own attributes. No image is ever sent through a network to find them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models import (
    VGG,
    ConvNeXt,
    EfficientNet,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    SwinTransformer,
    VisionTransformer,
)

from ssl_pipeline.models.small_resnet import SmallResNet


@dataclass(frozen=True)
class FeatureLevel:
    """One level of the feature pyramid.

    Attributes:
        modules: names of the trunk's modules that lead to it from the level before.
        width: its channels.
        stride: the image's pixels per pixel of it.
    """

    modules: tuple[str, ...]
    width: int
    stride: int


@dataclass(frozen=True)
class FeatureInfo:
    """A trunk without its classifier.

    Attributes:
        levels: from fine to coarse; the last is what a neck reads.
        classifier: prefixes of the classifier's keys in the library's state dict, which are cut off.
        final_norm: name of the module that the library applies after pooling, if it has one.
        norm_reads_rows: whether that module takes (B, D), rather than (B, D, 1, 1).
        channels_last: whether the modules speak (B, H, W, C).
        token: whether there is a class token.
        taps: of timm's trunks, the places in ``feature_info`` of all levels but the last.
        layers: what layer-wise learning rates count, from the image on: the stem or embeddings, then a block each. A layer is the
            names of its modules and parameters; what is in none of them (a final norm) goes with the head.
    """

    levels: dict[str, FeatureLevel]
    classifier: tuple[str, ...]
    final_norm: str | None = None
    norm_reads_rows: bool = False
    channels_last: bool = False
    token: bool = False
    taps: tuple[int, ...] = ()
    layers: tuple[tuple[str, ...], ...] = ()


def _named(levels: list[FeatureLevel]) -> dict[str, FeatureLevel]:
    """The coarsest level is c5, whatever the stem: the names detection heads know."""
    return {f"c{5 - len(levels) + 1 + i}": level for i, level in enumerate(levels)}


def _stride(module: Any) -> int:
    """The product of the strides along a chain of blocks: of a block's convolutions only one strides."""
    shortcuts = {
        id(c) for b in module.modules() if hasattr(b, "downsample") and b.downsample for c in b.downsample.modules()
    }
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d) and id(m) not in shortcuts]
    return math.prod(m.stride[0] for m in convolutions)


def _resnet(trunk: Any) -> FeatureInfo:
    pool = getattr(trunk, "maxpool", None)
    stem = ("conv1", "bn1", "relu", *(("maxpool",) if pool is not None else ()))
    stride = trunk.conv1.stride[0] * (2 if isinstance(pool, nn.MaxPool2d) else 1)
    levels = []
    for i in range(1, 5):
        stage = trunk.get_submodule(f"layer{i}")
        stride *= _stride(stage)
        block = list(stage.children())[-1]
        out = block.conv3 if hasattr(block, "conv3") else block.conv2
        assert isinstance(out, nn.Conv2d)
        levels.append(FeatureLevel((*(stem if i == 1 else ()), f"layer{i}"), out.out_channels, stride))
    stages = [f"layer{i}" for i in range(1, 5)]
    return FeatureInfo(_named(levels), ("fc.",), layers=(stem, *_blocks_of(trunk, stages)))


def _blocks_of(trunk: nn.Module, stages: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Each block of each stage as a layer."""
    for stage in stages:
        for name, _ in trunk.get_submodule(stage).named_children():
            yield (f"{stage}.{name}",)


def _vgg(trunk: Any) -> FeatureInfo:
    levels, modules, width, stride = [], list[str](), 0, 1
    layers = list[tuple[str, ...]]()
    for name, module in trunk.get_submodule("features").named_children():
        modules.append(f"features.{name}")
        if isinstance(module, nn.Conv2d):
            width = module.out_channels
            layers.append(())
        layers[-1] += (f"features.{name}",)
        if isinstance(module, nn.MaxPool2d):
            stride *= 2
            levels.append(FeatureLevel(tuple(modules), width, stride))
            modules = []
    return FeatureInfo(_named(levels), ("classifier.",), layers=tuple(layers))


def _pairs(trunk: Any, width_of: Callable[[Any], int]) -> dict[str, FeatureLevel]:
    """ConvNeXt and Swin: an embedding or a merge, then a stage of blocks, four times."""
    features = trunk.get_submodule("features")
    stride = features[0][0].stride[0]
    levels = []
    for i in range(4):
        block = list(features.get_submodule(str(2 * i + 1)).children())[-1]
        levels.append(FeatureLevel((f"features.{2 * i}", f"features.{2 * i + 1}"), width_of(block), stride * 2**i))
    return _named(levels)


def _layers_of_pairs(trunk: Any) -> tuple[tuple[str, ...], ...]:
    """The embedding, then a block each; a merge is a part of the block after it."""
    layers: list[tuple[str, ...]] = [("features.0",)]
    for i in range(4):
        first, *others = _blocks_of(trunk, [f"features.{2 * i + 1}"])
        layers += [(*((f"features.{2 * i}",) if i else ()), *first), *others]
    return tuple(layers)


def _convnext(trunk: Any) -> FeatureInfo:
    levels = _pairs(trunk, lambda block: int(block.layer_scale.shape[0]))
    return FeatureInfo(levels, ("classifier.2.",), "classifier", layers=_layers_of_pairs(trunk))


def _swin(trunk: Any) -> FeatureInfo:
    levels = _pairs(trunk, lambda block: int(block.norm1.normalized_shape[0]))
    last = levels["c5"]
    levels["c5"] = FeatureLevel((*last.modules, "norm"), last.width, last.stride)
    return FeatureInfo(levels, ("head.",), channels_last=True, layers=_layers_of_pairs(trunk))


def _blocks(trunk: Any) -> FeatureInfo:
    """EfficientNet and MobileNet: a chain of blocks; a level ends where the next block strides."""
    levels, modules, stride, width = [], list[str](), 1, 0
    layers = list[tuple[str, ...]]()
    for name, module in trunk.get_submodule("features").named_children():
        layers += _blocks_of(trunk, [f"features.{name}"]) if type(module) is nn.Sequential else [(f"features.{name}",)]
        step = _stride(module)
        if step > 1 and modules:
            levels.append(FeatureLevel(tuple(modules), width, stride))
            modules = []
        modules.append(f"features.{name}")
        stride *= step
        last: Any = list(module.children())[-1] if type(module) is nn.Sequential else module
        width = int(last.out_channels)
    levels.append(FeatureLevel(tuple(modules), width, stride))
    *layers, block, widening = layers  # the convolution after the last block is no layer of its own
    return FeatureInfo(_named(levels), ("classifier.",), layers=(*layers, block + widening))


def _vit(trunk: Any) -> FeatureInfo:
    level = FeatureLevel((), int(trunk.hidden_dim), int(trunk.patch_size))
    embeddings = ("class_token", "conv_proj", "encoder.pos_embedding")
    layers = (embeddings, *_blocks_of(trunk, ["encoder.layers"]))
    return FeatureInfo({"c5": level}, ("heads.",), token=True, layers=layers)


_FAMILIES: dict[type[nn.Module], Callable[[nn.Module], FeatureInfo]] = {
    ResNet: _resnet,
    SmallResNet: _resnet,
    VGG: _vgg,
    ConvNeXt: _convnext,
    SwinTransformer: _swin,
    EfficientNet: _blocks,
    MobileNetV2: _blocks,
    MobileNetV3: _blocks,
    VisionTransformer: _vit,
}


def feature_info(trunk: Any) -> FeatureInfo | None:
    """The anatomy of a torchvision network; None if its family is not known here."""
    read = _FAMILIES.get(type(trunk))
    return read(trunk) if read else None


def remove_classifier(trunk: nn.Module, anatomy: FeatureInfo) -> None:
    """Removes what only the library's own classes need, in place; all other keys keep the library's names."""
    for prefix in anatomy.classifier:
        name = prefix.rstrip(".")
        if "." in name:  # ConvNeXt: the classifier's norm stays, its linear layer goes
            owner, _, child = name.rpartition(".")
            sequence = trunk.get_submodule(owner)
            assert isinstance(sequence, nn.Sequential)
            setattr(trunk, owner, nn.Sequential(*list(sequence.children())[: int(child)]))
        elif hasattr(trunk, name):
            setattr(trunk, name, nn.Identity())


def shrink_stem(trunk: nn.Module) -> bool:
    """Gives the trunk a stem for small images, in place: 3×3 with stride 1, no max-pool. False if its family has none."""
    if isinstance(trunk, SmallResNet | VGG):
        return True
    if isinstance(trunk, ResNet):
        trunk.conv1 = nn.Conv2d(3, trunk.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
        return True
    if isinstance(trunk, EfficientNet | MobileNetV2 | MobileNetV3):
        stem = trunk.features[0][0]
        assert isinstance(stem, nn.Conv2d)
        stem.stride = (1, 1)
        return True
    return False


def adapt_input_conv(trunk: nn.Module, channels: int) -> None:
    """Fits the first convolution to another number of channels, in place.

    The kernels' sum, shared evenly: an image whose channels are all alike gives what its RGB form gave.
    """
    name, stem = first_convolution(trunk)
    owner, _, child = name.rpartition(".")
    like: Any = stem
    fitted = type(like)(  # timm's convolutions with TensorFlow's padding are of a class of their own
        channels,
        like.out_channels,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        bias=like.bias is not None,
    )
    with torch.no_grad():
        summed = stem.weight.sum(1, keepdim=True) / channels
        fitted.weight.copy_(summed.expand(-1, channels, -1, -1))
        if stem.bias is not None:
            fitted.bias.copy_(stem.bias)
    setattr(trunk.get_submodule(owner), child, fitted)


def first_convolution(trunk: nn.Module) -> tuple[str, nn.Conv2d]:
    """The stem's convolution, which sees the images, and its name."""
    return next((name, module) for name, module in trunk.named_modules() if isinstance(module, nn.Conv2d))
