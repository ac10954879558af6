"""The backbone: a library's network without its classifier, under the library's own names."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.models.timm_backbones import (
    check_patches,
    create_timm,
    fixed_size,
    is_timms,
    timm_info,
    timm_maps,
    timm_name,
    unused_parameters,
    with_tag,
)
from ssl_pipeline.models.torchvision_backbones import (
    FeatureInfo,
    FeatureLevel,
    SmallResNet,
    adapt_input_conv,
    feature_info,
    remove_classifier,
    shrink_stem,
    torchvision_names,
)
from ssl_pipeline.models.weights import is_file_name, load_published

_SMALL_IMAGES = 64


class BackboneConfig(FrozenModel):
    """Which network extracts the features.

    Attributes:
        name: ``small_resnet``, a torchvision name (``resnet50``, ``vit_b_16``, …), or timm's: ``timm/NAME``, or ``NAME``
            where torchvision has none of that name.
        weights: an official enum name (``IMAGENET1K_V2``; ``DEFAULT``), for timm a pretrained tag or ``DEFAULT``, or a
            file.
        weights_key: which network of a file that holds several, such as ``teacher`` or ``encoder_k``.
        stem: ``small``: 3×3 with stride 1 for small images. ``auto``: that for images up to 64 px, where the family has
            one and no weights are given. ``imagenet``: as published; for small_resnet 3×3 with stride 2.
        width: of small_resnet's first stage.
    """

    name: str = "small_resnet"
    weights: str | None = None
    weights_key: str | None = None
    stem: Literal["auto", "imagenet", "small"] = "auto"
    width: int = Field(16, ge=1)

    @property
    def is_timm(self) -> bool:
        return self.name.startswith("timm/") or self.name not in {"small_resnet", *torchvision_names()}

    @property
    def official(self) -> str | None:
        """The weights, where they are no file but a library's by name."""
        return None if self.weights is None or is_file_name(self.weights) else self.weights


class Backbone(nn.Module):
    """A library's network and its feature maps.

    Attributes:
        trunk: the network without its classifier; its state dict has the library's names.
        levels: from fine to coarse; of timm's networks and transformers their modules are not known.
        widths: channels of each level.
        strides: the image's pixels per pixel of each level.
        has_token: whether there is a class token.
        fixed_input: the image size in pixels that a vision transformer is bound to, or None.
        layers: for layer-wise learning rates, see :class:`ssl_pipeline.models.torchvision_backbones.FeatureInfo`.
        unused: names of those of its parameters that no map depends on.
    """

    unused: frozenset[str] = frozenset()

    def __init__(self, trunk: nn.Module, info: FeatureInfo) -> None:
        super().__init__()
        self.trunk, self._info = trunk, info
        self.levels: dict[str, FeatureLevel] = info.levels
        self.widths = {name: level.width for name, level in info.levels.items()}
        self.strides = {name: level.stride for name, level in info.levels.items()}
        self.layers, self.has_token = info.layers, info.token
        self.fixed_input = int(trunk.image_size) if isinstance(trunk, VisionTransformer) else fixed_size(trunk)

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
        for name, level in self.levels.items():
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
    """Builds a backbone, with its weights if some are named; and notes for the log.

    The image size, in pixels, decides the stem under ``auto``; a vision transformer is bound to it.

    Raises:
        ConfigError: an unknown name or stem, or weights that do not fit.
    """
    if config.weights_key is not None and (config.weights is None or config.official):
        raise ConfigError(
            f"`backbone.weights_key={config.weights_key}` chooses a part of a file, and `backbone.weights` is "
            f"{config.weights or 'null'}: give a file, or leave the key out."
        )
    if config.is_timm:
        return _build_timm(config, channels, image_size)
    trunk = _torchvision(config, image_size)
    notes = _fit_stem(trunk, config, image_size)
    info = feature_info(trunk, config.name)
    remove_classifier(trunk, info)
    if config.weights is not None:
        notes += load_published(trunk, config.name, config.weights, config.weights_key, info.classifier, channels)
    elif channels != 3:
        notes.append(adapt_input_conv(trunk, channels))
    return Backbone(trunk, info), notes


def _build_timm(config: BackboneConfig, channels: int, image_size: int) -> tuple[Backbone, list[str]]:
    name, notes = timm_name(config.name), list[str]()
    if config.stem == "small":
        raise ConfigError(
            "`backbone.stem=small` is for torchvision's ResNets, VGGs, EfficientNets and MobileNets; "
            "timm has models with small stems of its own."
        )
    if config.official:
        name = with_tag(name, config.official)
    # A file is read into the network it was written for; its stem is fitted to the images after that.
    file = None if config.official else config.weights
    trunk = create_timm(name, config.official is not None, image_size, channels if file is None else 3)
    info = timm_info(trunk)
    if file is not None:
        notes = load_published(trunk, name, file, config.weights_key, info.classifier, channels)
    backbone = Backbone(trunk, info)
    backbone.unused = unused_parameters(config.name, backbone, backbone.widths, channels, image_size)
    return backbone, notes


def is_network(name: str) -> bool:
    """Whether torchvision or timm has a network of that name, with or without ``timm/`` and a pretrained tag."""
    return name in torchvision_names() or is_timms(name.removeprefix("timm/"))


def stem_at(config: BackboneConfig, image_size: int) -> Literal["auto", "imagenet", "small"]:
    """The stem that ``auto`` chooses for an image size; it stays ``auto`` where the size decides nothing."""
    if config.stem != "auto" or config.is_timm or config.name == "small_resnet":
        return config.stem
    return "small" if _wants_small(config, image_size) and shrink_stem(_torchvision(config, image_size)) else "imagenet"


def _wants_small(config: BackboneConfig, image_size: int) -> bool:
    """Whether ``auto`` takes the small stem where the family has one."""
    return config.stem == "auto" and config.weights is None and image_size <= _SMALL_IMAGES


def _fit_stem(trunk: nn.Module, config: BackboneConfig, image_size: int) -> list[str]:
    """The stem that the configuration asks for, in place; notes for the log."""
    if config.stem != "small" and not _wants_small(config, image_size):
        return []
    # Theirs is 3×3 with stride 1 anyhow.
    alike = config.name == "small_resnet" or config.name.startswith("vgg")
    if config.stem == "small" and config.official and not alike:
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
    automatic = has_one and config.stem == "auto" and not alike
    return [f"backbone: small stem for images of {image_size} px"] if automatic else []


def _torchvision(config: BackboneConfig, image_size: int) -> nn.Module:
    name = config.name
    if name == "small_resnet":
        if config.official:
            raise ConfigError("`backbone.weights`: small_resnet has no official weights; give a file, or null.")
        return SmallResNet(config.width, stem_stride=2 if config.stem == "imagenet" else 1)
    size = {}
    if name.startswith("vit_"):
        check_patches(name, image_size, int(name.rsplit("_", 1)[1]))
        size = {"image_size": image_size}
    trunk: nn.Module = get_model(name, **size)
    return trunk
