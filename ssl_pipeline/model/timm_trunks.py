"""Trunks by timm, an optional extra: named ``timm/NAME``, or by a name that torchvision does not have."""

from __future__ import annotations

import difflib
import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import list_models

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.model.families import Anatomy, Level, sum_stem_kernels
from ssl_pipeline.model.weights import holds_channels, is_file_name, load_trunk, network_weights

if TYPE_CHECKING:
    from ssl_pipeline.model.backbone import BackboneConfig


def build_timm(config: BackboneConfig, channels: int, image_size: int) -> tuple[nn.Module, Anatomy, list[str]]:
    """Builds a trunk by timm without its classifier.

    Args:
        config: which one.
        channels: of the images.
        image_size: in pixels; a transformer is bound to it.

    Returns:
        The trunk, its anatomy, and notes for the log.

    Raises:
        ConfigError: timm is absent or has no such network, or the weights or the size do not fit.
    """
    name = _known(config)
    if config.stem == "small":
        raise ConfigError(
            "`backbone.stem=small` is for torchvision's ResNets, VGGs, EfficientNets and MobileNets; "
            "timm has models with small stems of its own."
        )
    path = config.weights if config.weights is not None and is_file_name(config.weights) else None
    official = config.weights is not None and path is None
    if config.weights is not None and official:
        name = _with_tag(name, config.weights)
    # A file is read into the network it was written for; its stem is fitted to the images after that.
    trunk = _create(name, official, image_size, channels if path is None else 3)
    notes = list[str]()
    if path is not None:
        state, notes = network_weights(trunk, config)
        if channels != 3 and holds_channels(trunk, state, channels):
            sum_stem_kernels(trunk, channels)
        prefixes = trunk.default_cfg["classifier"]
        prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
        notes += load_trunk(trunk, state, tuple(f"{p}." for p in prefixes), f"`backbone.weights` {path}")
        if channels != 3 and not holds_channels(trunk, state, channels):
            sum_stem_kernels(trunk, channels)
            notes.append(f"backbone: the stem's kernels were summed for images with {channels} channel(s)")
    return trunk, _anatomy(trunk), notes


def _known(config: BackboneConfig) -> str:
    """The network's name in timm; an error with the nearest names if it has none."""
    name = config.name.removeprefix("timm/")
    elsewhere = difflib.get_close_matches(name, [*list_models(module=models), "small_resnet"], n=3)
    hint = f" torchvision's nearest: {', '.join(elsewhere)}." if elsewhere and name == config.name else ""
    if importlib.util.find_spec("timm") is None:
        fault = "needs timm" if name != config.name else "is not torchvision's, and others need timm"
        raise ConfigError(
            f"`backbone.name`: {config.name!r} {fault}: pip install -e '.[timm]' in the project's folder.{hint}"
        )
    import timm

    if not timm.is_model(name.split(".")[0]):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        nearest = f" timm's nearest: {close}." if close else ""
        where = "neither torchvision nor timm has" if name == config.name else "timm has no"
        raise ConfigError(
            f"`backbone.name`: {where} {name!r}.{hint}{nearest} "
            "Take a name from torchvision's or timm's list of models."
        )
    return name


def _tags(name: str) -> list[str]:
    """Pretrained tags of a network, timm's default first."""
    import timm

    architecture = name.split(".")[0]
    default: Any = timm.get_pretrained_cfg(architecture)
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    return sorted(tags, key=lambda tag: default is None or tag != default.tag)


def _with_tag(name: str, tag: str) -> str:
    """A network's name with a pretrained tag, as timm writes it.

    Raises:
        ConfigError: timm has no such tag of it; names those that it has.
    """
    known = _tags(name)
    architecture, _, named = name.partition(".")
    if not known:
        raise ConfigError(
            f"`backbone.weights`: timm has no pretrained weights of {architecture!r}: give a file, or null."
        )
    wanted = (named or known[0]) if tag == "DEFAULT" else tag
    if wanted not in known:
        raise ConfigError(
            f"`backbone.weights`: timm's {architecture} has no pretrained tag {wanted!r}. Known: {', '.join(known)} (the first one is "
            "DEFAULT); or give a file (.safetensors, .pth)."
        )
    return f"{architecture}.{wanted}"


def pretrained_tags(config: BackboneConfig) -> list[str]:
    """The tags that ``backbone.weights`` may name for one of timm's networks, the default first.

    Raises:
        ConfigError: timm is absent or has no such network.
    """
    return _tags(_known(config))


def pretrained_cfg(config: BackboneConfig, tag: str) -> dict[str, Any]:
    """What timm publishes beside pretrained weights.

    Args:
        config: the network.
        tag: of the weights, or ``DEFAULT``.

    Raises:
        ConfigError: timm is absent, or has no such network or tag.
    """
    name = _with_tag(_known(config), tag)
    import timm

    registered: Any = timm.get_pretrained_cfg(name)
    found: dict[str, Any] = registered.to_dict()
    return found


def data_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """``input_size``, ``mean``, ``std``, ``crop_pct``, ``crop_mode`` and ``interpolation``, timm's defaults filled in."""
    import timm.data

    library: Any = timm.data
    found: dict[str, Any] = library.resolve_data_config({}, pretrained_cfg=cfg)
    return found


def _create(name: str, official: bool, image_size: int, channels: int) -> Any:
    import timm

    options: dict[str, Any] = {"pretrained": official, "in_chans": channels, "num_classes": 0}
    try:
        try:
            trunk: Any = timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # a convolutional network has no img_size
            trunk = timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"`backbone.name`: timm could not make {name}: {error} On a machine without a network copy the weights there "
            "and give `backbone.weights=FILE`."
        ) from error
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if patch is not None and image_size % patch[0]:
        raise ConfigError(
            f"an image size of {image_size} px is no multiple of {name}'s patches of {patch[0]} px: "
            f"take {max(image_size // patch[0], 1) * patch[0]}."
        )
    if not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(
            f"`backbone.name`: timm's {name} gives no feature maps; take one that has forward_intermediates."
        )
    return trunk


def _anatomy(trunk: Any) -> Anatomy:
    """Levels as ``feature_info`` declares them, the last one being what the library itself would pool."""
    info = list(trunk.feature_info)
    last = Level((), int(trunk.num_features), int(info[-1]["reduction"]))
    ends = {int(f["reduction"]): i for i, f in enumerate(info) if f["reduction"] < last.stride}
    taps = tuple(ends[stride] for stride in sorted(ends))[-3:]
    levels = {
        f"c{5 - len(taps) + n}": Level((), int(info[i]["num_chs"]), int(info[i]["reduction"]))
        for n, i in enumerate(taps)
    }
    head_norm = getattr(getattr(trunk, "head", None), "norm", None)
    return Anatomy(
        {**levels, "c5": last},
        (),
        final_norm="head.norm" if isinstance(head_norm, nn.Module) else None,
        token=getattr(trunk, "cls_token", None) is not None,
        taps=taps,
        layers=_layers(trunk),
    )


def _layers(trunk: Any) -> tuple[tuple[str, ...], ...]:
    """Parameter names by layer, as timm groups them for its own layer-wise rates; without such groups a child is a layer."""
    if not hasattr(trunk, "group_matcher"):
        return tuple((name,) for name, _ in trunk.named_children())
    from timm.models import group_parameters

    # timm's groups are of a network with its head, and a trunk has none: this one stands for it.
    names, head = [name for name, _ in trunk.named_parameters()], "a head, which no group of the trunk matches"
    whole: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in (*names, head)))
    found = group_parameters(whole, trunk.group_matcher(coarse=False), reverse=True)
    layers = [list[str]() for _ in range(found[head])]
    for name in names:
        if found[name] < len(layers):
            layers[found[name]].append(name)
    return tuple(map(tuple, layers))


def timm_maps(trunk: Any, anatomy: Anatomy, images: Tensor) -> dict[str, Tensor]:
    """Images (B, C, H, W) to a map (B, width, H ÷ stride, W ÷ stride) per level, and ``token`` where there is one."""
    if not anatomy.taps:
        last, taps = trunk.forward_features(images), []
    else:
        last, taps = trunk.forward_intermediates(images, indices=list(anatomy.taps), output_fmt="NCHW")
    maps = dict(zip(anatomy.levels, taps, strict=False))
    if last.ndim == 3:
        tokens, grid = last[:, trunk.num_prefix_tokens :], trunk.patch_embed.grid_size
        maps["c5"] = tokens.transpose(1, 2).unflatten(2, grid)
        return {**maps, "token": last[:, 0]} if anatomy.token else maps
    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    maps["c5"] = torch.permute(last, (0, 3, 1, 2)) if channels_last else last
    return maps
