"""The backbone: a library's network without its classifier, under the library's own names."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model, list_models

from ssl_pipeline.config.base import ConfigError, Strict
from ssl_pipeline.model.families import Anatomy, Level, anatomy_of, cut_classifier, shrink_stem
from ssl_pipeline.model.small_resnet import SmallResNet
from ssl_pipeline.model.weights import is_file_name, load_trunk, read_weights

_SMALL_IMAGES = 64


class BackboneConfig(Strict):
    """Which network extracts the features.

    Attributes:
        name: ``small_resnet``, a torchvision name (``resnet50``, ``vit_b_16``, …), or ``timm/NAME``.
        weights: an official enum name (``IMAGENET1K_V2``; ``DEFAULT``), for timm a pretrained tag or ``DEFAULT``, or a file.
        stem: ``small``: 3×3 with stride 1 for small images. ``auto``: that for images up to 64 px, where the family has one
            and no weights are given.
        width: of small_resnet's first stage.
    """

    name: str = "small_resnet"
    weights: str | None = None
    stem: Literal["auto", "imagenet", "small"] = "auto"
    width: int = Field(16, ge=1)

    @property
    def is_timm(self) -> bool:
        """Whether timm makes it."""
        return self.name.startswith("timm/")


class Backbone(nn.Module):
    """A trunk and its levels.

    Attributes:
        trunk: the library's network without its classifier; its state dict has the library's names.
        widths: channels of each level, from fine to coarse.
        strides: the image's pixels per pixel of each level.
        final_norm: name of the trunk's norm that belongs after pooling, or None.
        has_token: whether there is a class token.
    """

    def __init__(self, trunk: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.trunk, self._anatomy = trunk, anatomy
        self.widths = {name: level.width for name, level in anatomy.levels.items()}
        self.strides = {name: level.stride for name, level in anatomy.levels.items()}
        self.final_norm, self.has_token = anatomy.final_norm, anatomy.token

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to a map (B, width, H ÷ stride, W ÷ stride) per level; ``token``: (B, D) where there is one."""
        if isinstance(self.trunk, VisionTransformer):
            return self._tokens(self.trunk, images)
        if hasattr(self.trunk, "forward_intermediates"):  # timm
            (last,) = self.trunk.forward_intermediates(  # type: ignore[operator]
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
            return {"c5": last}
        maps, x = {}, images
        for name, level in self._anatomy.levels.items():
            for module in level.modules:
                x = self.trunk.get_submodule(module)(x)
            maps[name] = x.permute(0, 3, 1, 2) if self._anatomy.channels_last else x
        return maps

    def _tokens(self, trunk: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
        patches = trunk._process_input(images)
        tokens = trunk.encoder(torch.cat([trunk.class_token.expand(len(patches), -1, -1), patches], 1))
        side = images.shape[-1] // trunk.patch_size
        return {"c5": tokens[:, 1:].transpose(1, 2).unflatten(2, (-1, side)), "token": tokens[:, 0]}


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
    if config.is_timm:
        return _build_timm(config, channels, image_size)
    trunk = _torchvision(config, image_size)
    small = config.stem == "small" or (config.stem == "auto" and config.weights is None and image_size <= _SMALL_IMAGES)
    notes = []
    if small:
        has_one = shrink_stem(trunk)
        if not has_one and config.stem == "small":
            raise ConfigError(
                f"`backbone.stem`: {config.name} has no small stem; ResNets, VGGs, EfficientNets and MobileNets have. "
                "Take one of them, or backbone.stem=imagenet."
            )
        if has_one and config.stem == "auto" and not config.name.startswith(("small_resnet", "vgg")):
            notes.append(f"backbone: small stem for images of {image_size} px")
    anatomy = anatomy_of(trunk)
    if anatomy is None:
        raise ConfigError(
            f"`backbone.name`: {config.name} is of a torchvision family without feature maps here (known: ResNet, VGG, "
            "ConvNeXt, ViT, Swin, EfficientNet, MobileNet). timm has most others: backbone.name=timm/NAME."
        )
    cut_classifier(trunk, anatomy)
    if config.weights is not None:
        state = read_weights(config.name, config.weights)
        notes += load_trunk(trunk, state, anatomy.classifier, f"`backbone.weights` {config.weights}")
    if channels != 3:
        sum_stem_kernels(trunk, channels)
        notes.append(f"backbone: the stem's kernels were summed for images with {channels} channel(s)")
    return Backbone(trunk, anatomy), notes


def _torchvision(config: BackboneConfig, image_size: int) -> nn.Module:
    name = config.name
    if name == "small_resnet":
        if config.weights is not None and not is_file_name(config.weights):
            raise ConfigError("`backbone.weights`: small_resnet has no official weights; give a file, or null.")
        return SmallResNet(config.width)
    known = list_models()
    if name not in known:
        close = difflib.get_close_matches(name, [*known, "small_resnet"], n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "See torchvision's list of models."
        raise ConfigError(f"`backbone.name`: torchvision has no {name!r}. {hint} Others come by timm/NAME.")
    if not name.startswith("vit_"):
        trunk: nn.Module = get_model(name)
        return trunk
    patch = int(name.rsplit("_", 1)[1])
    if image_size % patch:
        raise ConfigError(f"`views.size` of {image_size} is no multiple of {name}'s patches of {patch} px.")
    transformer: nn.Module = get_model(name, image_size=image_size)
    return transformer


def sum_stem_kernels(trunk: nn.Module, channels: int) -> None:
    """Fits the first convolution to another number of channels, in place.

    The kernels' sum, shared evenly: an image whose channels are all alike gives what its RGB form gave.
    """
    name, stem = next((n, m) for n, m in trunk.named_modules() if isinstance(m, nn.Conv2d))
    owner, _, child = name.rpartition(".")
    fitted = nn.Conv2d(
        channels,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]
        stem.stride,  # type: ignore[arg-type]
        stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    with torch.no_grad():
        summed = stem.weight.sum(1, keepdim=True) / channels
        fitted.weight.copy_(summed.expand(-1, channels, -1, -1))
        if stem.bias is not None and fitted.bias is not None:
            fitted.bias.copy_(stem.bias)
    setattr(trunk.get_submodule(owner), child, fitted)


def _build_timm(config: BackboneConfig, channels: int, image_size: int) -> tuple[Backbone, list[str]]:
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(f"`backbone.name` {config.name} needs timm: pip install 'ssl-pipeline[timm]'.")
    import timm

    name = config.name.removeprefix("timm/")
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(f"`backbone.name`: timm has no {name!r}. Near: {', '.join(close) or 'none'}.")
    if config.stem == "small":
        raise ConfigError(
            "`backbone.stem=small` is for torchvision's families; timm has models with small stems of its own."
        )
    options: dict[str, Any] = {"in_chans": channels, "num_classes": 0}
    official = config.weights is not None and not is_file_name(config.weights)
    if official and config.weights != "DEFAULT":
        name = f"{name.split('.')[0]}.{config.weights}"
    trunk: Any
    try:
        try:
            trunk = timm.create_model(name, pretrained=official, img_size=image_size, **options)
        except TypeError:  # a convolutional network has no img_size
            trunk = timm.create_model(name, pretrained=official, **options)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"`backbone.name`: {name} could not be made by timm: {error}") from error
    notes = []
    if config.weights is not None and not official:
        state = read_weights(name, config.weights)
        prefix = trunk.default_cfg.get("classifier") or "classifier"
        prefixes = tuple(f"{p}." for p in ([prefix] if isinstance(prefix, str) else prefix))
        notes += load_trunk(trunk, state, prefixes, f"`backbone.weights` {config.weights}")
    last = trunk.feature_info[-1]
    level = Level((), int(last["num_chs"]), int(last["reduction"]))
    return Backbone(trunk, Anatomy({"c5": level}, ())), notes
