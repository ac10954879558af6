"""The backbone: a library's network without its classifier, under the library's own names."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.backbone_config import BackboneConfig, torchvision_names
from ssl_pipeline.models.small_resnet import SmallResNet
from ssl_pipeline.models.timm_backbones import (
    build_timm,
    check_patches,
    fixed_size,
    is_timms,
    timm_maps,
    unused_parameters,
)
from ssl_pipeline.models.torchvision_backbones import (
    FeatureInfo,
    FeatureLevel,
    adapt_input_conv,
    feature_info,
    remove_classifier,
    shrink_stem,
)
from ssl_pipeline.models.weights import KERNELS_SUMMED, is_file_name, load_published

_SMALL_IMAGES = 64


class Backbone(nn.Module):
    """A library's network and its feature maps.

    Attributes:
        trunk: the network without its classifier; its state dict has the library's names.
        widths: channels of each level, from fine to coarse.
        strides: the image's pixels per pixel of each level.
        has_token: whether there is a class token.
        fixed_input: the image size in pixels that a vision transformer is bound to, or None.
        layers: for layer-wise learning rates, see :class:`ssl_pipeline.models.torchvision_backbones.FeatureInfo`.
        unused: names of those of its parameters that no map depends on.
    """

    unused: frozenset[str] = frozenset()

    def __init__(self, trunk: nn.Module, info: FeatureInfo) -> None:
        super().__init__()
        self.trunk, self._info, self.layers = trunk, info, info.layers
        self.widths = {name: level.width for name, level in info.levels.items()}
        self.strides = {name: level.stride for name, level in info.levels.items()}
        self.has_token = info.token
        self.fixed_input = int(trunk.image_size) if isinstance(trunk, VisionTransformer) else fixed_size(trunk)

    @property
    def levels(self) -> dict[str, FeatureLevel]:
        """The modules of each level, from fine to coarse; of timm's networks and transformers they are not known."""
        return self._info.levels

    @property
    def final_norm(self) -> nn.Module:
        """The norm that the library applies after pooling; the identity where it has none.

        A property, as a second registration would put its parameters into the state dict twice.
        """
        name = self._info.final_norm
        return nn.Identity() if name is None else self.trunk.get_submodule(name)

    def normalize(self, features: Tensor) -> Tensor:
        """Pooled features (B, D) as the library normalizes them."""
        rows = self._info.norm_reads_rows
        normalized: Tensor = self.final_norm(features if rows else features[:, :, None, None])
        return normalized.flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to a map (B, width, H ÷ stride, W ÷ stride) per level, and ``token``, (B, D), if it has one."""
        if isinstance(self.trunk, VisionTransformer):
            return self._vit_maps(self.trunk, images)
        if hasattr(self.trunk, "forward_intermediates"):  # timm
            return timm_maps(self.trunk, self._info, images)
        maps, x = {}, images
        for name, level in self._info.levels.items():
            for module in level.modules:
                x = self.trunk.get_submodule(module)(x)
            maps[name] = x.permute(0, 3, 1, 2) if self._info.channels_last else x
        return maps

    def _vit_maps(self, trunk: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
        patches = trunk._process_input(images)  # its shape and not its len, which an export would take for a constant
        tokens = trunk.encoder(torch.cat([trunk.class_token.expand(patches.shape[0], -1, -1), patches], 1))
        side = images.shape[-1] // trunk.patch_size
        return {"c5": tokens[:, 1:].transpose(1, 2).unflatten(2, (-1, side)), "token": tokens[:, 0]}


def build_backbone(config: BackboneConfig, channels: int, image_size: int) -> tuple[Backbone, list[str]]:
    """Builds a backbone, with its weights if some are named.

    Args:
        config: which one.
        channels: of the images.
        image_size: of the images in pixels: decides the stem under ``auto``; a vision transformer is bound to it.

    Returns:
        The backbone, and notes for the log.

    Raises:
        ConfigError: an unknown name or stem, or weights that do not fit.
    """
    if config.weights_key is not None and (config.weights is None or not is_file_name(config.weights)):
        raise ConfigError(
            f"`backbone.weights_key={config.weights_key}` chooses a part of a file, and `backbone.weights` is "
            f"{config.weights or 'null'}: give a file, or leave the key out."
        )
    if config.is_timm:
        made, info, notes = build_timm(config, channels, image_size)
        backbone = Backbone(made, info)
        backbone.unused = unused_parameters(config.name, backbone, backbone.widths, channels, image_size)
        return backbone, notes
    trunk = _torchvision(config, image_size)
    notes = _fit_stem(trunk, config, image_size)
    found = feature_info(trunk)
    if found is None:
        raise ConfigError(
            f"`backbone.name`: {config.name} is of a torchvision family without feature maps here (known: ResNet, VGG, "
            "ConvNeXt, ViT, Swin, EfficientNet, MobileNet). timm has most others: backbone.name=timm/NAME."
        )
    remove_classifier(trunk, found)
    if config.weights is not None:
        notes += load_published(trunk, config, found.classifier, channels)
    elif channels != 3:
        adapt_input_conv(trunk, channels)
        notes.append(KERNELS_SUMMED.format(channels))
    return Backbone(trunk, found), notes


def is_network(name: str) -> bool:
    """Whether torchvision or timm has a network of that name, with or without ``timm/`` and a pretrained tag."""
    return name in torchvision_names() or is_timms(name.removeprefix("timm/"))


def stem_at(config: BackboneConfig, image_size: int) -> Literal["auto", "imagenet", "small"]:
    """The stem that ``auto`` chooses for an image size; it stays ``auto`` where the size decides nothing."""
    if config.stem != "auto" or config.is_timm or config.name == "small_resnet":
        return config.stem
    automatic = config.weights is None and image_size <= _SMALL_IMAGES
    return "small" if automatic and shrink_stem(_torchvision(config, image_size)) else "imagenet"


def _fit_stem(trunk: nn.Module, config: BackboneConfig, image_size: int) -> list[str]:
    """The stem that the configuration asks for, in place; notes for the log."""
    automatic = config.stem == "auto" and config.weights is None and image_size <= _SMALL_IMAGES
    if config.stem != "small" and not automatic:
        return []
    # Theirs is 3×3 with stride 1 anyhow.
    alike = config.name == "small_resnet" or config.name.startswith("vgg")
    if config.stem == "small" and config.weights is not None and not alike and not is_file_name(config.weights):
        raise ConfigError(
            f"`backbone.stem=small` does not go with `backbone.weights={config.weights}`: {config.name}'s official weights "
            "have the ImageNet stem. Take stem=imagenet, or weights=null."
        )
    has_one = shrink_stem(trunk)
    if not has_one and config.stem == "small":
        raise ConfigError(
            f"`backbone.stem`: {config.name} has no small stem; ResNets, VGGs, EfficientNets and MobileNets have. "
            "Take one of them, or backbone.stem=imagenet."
        )
    return [f"backbone: small stem for images of {image_size} px"] if has_one and automatic and not alike else []


def _torchvision(config: BackboneConfig, image_size: int) -> nn.Module:
    name = config.name
    if name == "small_resnet":
        if config.weights is not None and not is_file_name(config.weights):
            raise ConfigError("`backbone.weights`: small_resnet has no official weights; give a file, or null.")
        return SmallResNet(config.width, stem_stride=2 if config.stem == "imagenet" else 1)
    if not name.startswith("vit_"):
        trunk: nn.Module = get_model(name)
        return trunk
    check_patches(name, image_size, int(name.rsplit("_", 1)[1]))
    transformer: nn.Module = get_model(name, image_size=image_size)
    return transformer
