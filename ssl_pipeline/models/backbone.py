"""The backbone: a library's network without its classifier, under the library's own names."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VisionTransformer, get_model, list_models

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.models.families import (
    FeatureInfo,
    FeatureLevel,
    adapt_input_conv,
    feature_info,
    remove_classifier,
    shrink_stem,
)
from ssl_pipeline.models.small_resnet import SmallResNet
from ssl_pipeline.models.timm_trunks import build_timm, is_timms, timm_maps, try_out
from ssl_pipeline.models.weights import holds_channels, is_file_name, load_trunk, network_weights

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
        """Whether timm makes it."""
        return self.name.startswith("timm/") or self.name not in {"small_resnet", *_classifiers()}


def _classifiers() -> list[str]:
    """Names of torchvision's image classifiers; its detectors would fetch weights of their own accord when built."""
    names: list[str] = list_models(module=models)
    return names


def is_network(name: str) -> bool:
    """Whether torchvision or timm has a network of that name, with or without ``timm/`` and a pretrained tag."""
    return name in _classifiers() or is_timms(name.removeprefix("timm/"))


class Backbone(nn.Module):
    """A trunk and its levels.

    Attributes:
        trunk: the library's network without its classifier; its state dict has the library's names.
        widths: channels of each level, from fine to coarse.
        strides: the image's pixels per pixel of each level.
        has_token: whether there is a class token.
        fixed_input: the image size in pixels that a vision transformer is bound to, or None.
        unused: names of those of its parameters that no map depends on.
    """

    unused: frozenset[str] = frozenset()

    def __init__(self, trunk: nn.Module, anatomy: FeatureInfo) -> None:
        super().__init__()
        self.trunk, self._anatomy = trunk, anatomy
        self.widths = {name: level.width for name, level in anatomy.levels.items()}
        self.strides = {name: level.stride for name, level in anatomy.levels.items()}
        self.has_token = anatomy.token
        self.fixed_input = int(trunk.image_size) if isinstance(trunk, VisionTransformer) else _timm_size(trunk)

    @property
    def levels(self) -> dict[str, FeatureLevel]:
        """What leads to each level, from fine to coarse; timm's trunks and transformers don't say."""
        return self._anatomy.levels

    def normalize(self, features: Tensor) -> Tensor:
        """Pooled features (B, D) as the library normalizes them."""
        rows = self._anatomy.norm_reads_rows
        normalized: Tensor = self.final_norm(features if rows else features[:, :, None, None])
        return normalized.flatten(1)

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """What layer-wise learning rates count, from the image on; see :class:`ssl_pipeline.models.families.FeatureInfo`."""
        return self._anatomy.layers

    @property
    def final_norm(self) -> nn.Module:
        """The trunk's norm that its library applies after pooling; the identity where it has none.

        A property, for as a second registration its parameters would be in the state dict twice.
        """
        name = self._anatomy.final_norm
        return nn.Identity() if name is None else self.trunk.get_submodule(name)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to a map (B, width, H ÷ stride, W ÷ stride) per level, and ``token``.

        The ``token``, (B, D), is there where ``has_token`` is true.
        """
        if isinstance(self.trunk, VisionTransformer):
            return self._tokens(self.trunk, images)
        if hasattr(self.trunk, "forward_intermediates"):  # timm
            return timm_maps(self.trunk, self._anatomy, images)
        maps, x = {}, images
        for name, level in self._anatomy.levels.items():
            for module in level.modules:
                x = self.trunk.get_submodule(module)(x)
            maps[name] = x.permute(0, 3, 1, 2) if self._anatomy.channels_last else x
        return maps

    def _tokens(self, trunk: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
        patches = trunk._process_input(images)  # its shape and not its len, which an export would take for a constant
        tokens = trunk.encoder(torch.cat([trunk.class_token.expand(patches.shape[0], -1, -1), patches], 1))
        side = images.shape[-1] // trunk.patch_size
        return {"c5": tokens[:, 1:].transpose(1, 2).unflatten(2, (-1, side)), "token": tokens[:, 0]}


def _timm_size(trunk: nn.Module) -> int | None:
    """The size that a transformer of timm's insists on."""
    embedding: Any = getattr(trunk, "patch_embed", None)
    return int(embedding.img_size[0]) if getattr(embedding, "strict_img_size", False) else None


def build_backbone(config: BackboneConfig, channels: int, image_size: int) -> tuple[Backbone, list[str]]:
    """Builds a backbone, with its weights if some are asked for.

    Args:
        config: which one.
        channels: of the images.
        image_size: of the images in pixels: decides the stem under ``auto``; a vision transformer is bound to it.

    Returns:
        The backbone, and notes for the log.

    Raises:
        ConfigError: an unknown name or stem, or weights that do not fit.
    """
    _check_key(config)
    if config.is_timm:
        made, anatomy, notes = build_timm(config, channels, image_size)
        backbone = Backbone(made, anatomy)
        backbone.unused = try_out(config.name, backbone, backbone.widths, channels, image_size)
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
    fitted = channels == 3
    if config.weights is not None:
        state, renamed = network_weights(trunk, config)
        notes += renamed
        if not fitted and holds_channels(trunk, state, channels):
            adapt_input_conv(trunk, channels)  # only for the shape: the file has kernels for these images
            fitted = True
        notes += load_trunk(trunk, state, found.classifier, f"`backbone.weights` {config.weights}")
    if not fitted:
        adapt_input_conv(trunk, channels)
        notes.append(f"backbone: the stem's kernels were summed for images with {channels} channel(s)")
    return Backbone(trunk, found), notes


def _check_key(config: BackboneConfig) -> None:
    if config.weights_key is not None and (config.weights is None or not is_file_name(config.weights)):
        raise ConfigError(
            f"`backbone.weights_key={config.weights_key}` chooses a part of a file, and `backbone.weights` is "
            f"{config.weights or 'null'}: give a file, or leave the key out."
        )


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
    patch = int(name.rsplit("_", 1)[1])
    if image_size % patch:
        raise ConfigError(
            f"an image size of {image_size} px is no multiple of {name}'s patches of {patch} px: "
            f"take {max(image_size // patch, 1) * patch}."
        )
    transformer: nn.Module = get_model(name, image_size=image_size)
    return transformer
