"""Backbones by timm, an optional extra: named ``timm/NAME``, or by a name that torchvision does not have."""

from __future__ import annotations

import difflib
import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ssl_pipeline.config.base import ConfigError, first_line
from ssl_pipeline.models.torchvision_backbones import FeatureInfo, FeatureLevel, Layers, torchvision_names


def is_timms(name: str) -> bool:
    """Whether timm is installed and has a network of that name; a pretrained tag may follow it."""
    if importlib.util.find_spec("timm") is None:
        return False
    import timm

    return bool(timm.is_model(name.split(".")[0]))


def timm_name(configured: str) -> str:
    """The name in timm of what ``backbone.name`` says.

    Raises:
        ConfigError: timm is absent, or has no such network; with the nearest names.
    """
    name = configured.removeprefix("timm/")
    if is_timms(name):
        return name
    elsewhere = difflib.get_close_matches(name, [*torchvision_names(), "small_resnet"], n=3)
    hint = f" torchvision's nearest: {', '.join(elsewhere)}." if elsewhere and name == configured else ""
    if importlib.util.find_spec("timm") is None:
        fault = "needs timm" if name != configured else "is not torchvision's, and others need timm"
        raise ConfigError(
            f"`backbone.name`: {configured!r} {fault}: pip install -e '.[timm]' in the project's folder.{hint}"
        )
    import timm

    close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
    nearest = f" timm's nearest: {close}." if close else ""
    where = "neither torchvision nor timm has" if name == configured else "timm has no"
    raise ConfigError(
        f"`backbone.name`: {where} {name!r}.{hint}{nearest} Take a name from torchvision's or timm's list of models."
    )


def pretrained_tags(name: str) -> list[str]:
    """The tags that ``backbone.weights`` may name for a network of timm's, the default first."""
    import timm

    architecture = name.split(".")[0]
    default: Any = timm.get_pretrained_cfg(architecture)
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    return sorted(tags, key=lambda tag: default is None or tag != default.tag)


def with_tag(name: str, tag: str) -> str:
    """A network's name with a pretrained tag, as timm writes it; ``DEFAULT`` is the tag that the name has, or timm's own.

    Raises:
        ConfigError: with the tags that there are.
    """
    known = pretrained_tags(name)
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


def create_timm(name: str, official: bool, image_size: int, channels: int) -> Any:
    """A network without its classifier, with official weights or fresh ones; a transformer is bound to the image size.

    Raises:
        ConfigError: it can't be made, gives no feature maps, or has patches that do not fit the images.
    """
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
    embedding: Any = getattr(trunk, "patch_embed", None)
    if hasattr(
        embedding, "grid_size"
    ):  # of other embeddings, the patches overlap, or are as large as all strides together
        check_patches(name, image_size, embedding.patch_size[0])
    if not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(
            f"`backbone.name`: timm's {name} gives no feature maps; take one that has forward_intermediates."
        )
    return trunk


def check_patches(name: str, image_size: int, patch: int) -> None:
    """Raises a ConfigError where images are not made of whole patches."""
    if image_size % patch:
        raise ConfigError(
            f"an image size of {image_size} px is no multiple of {name}'s patches of {patch} px: "
            f"take {max(image_size // patch, 1) * patch}."
        )


def fixed_size(trunk: nn.Module) -> int | None:
    """The image size that one of timm's transformers is bound to."""
    embedding: Any = getattr(trunk, "patch_embed", None)
    return int(embedding.img_size[0]) if getattr(embedding, "strict_img_size", False) else None


def timm_info(trunk: Any) -> FeatureInfo:
    """Levels as timm's ``feature_info`` declares them, the last one being what the library itself would pool."""
    info = list(trunk.feature_info)
    last = FeatureLevel((), int(trunk.num_features), int(info[-1]["reduction"]))
    ends = {int(f["reduction"]): i for i, f in enumerate(info) if f["reduction"] < last.stride}
    taps = tuple(ends[stride] for stride in sorted(ends))[-3:]
    levels = {
        f"c{5 - len(taps) + n}": FeatureLevel((), int(info[i]["num_chs"]), int(info[i]["reduction"]))
        for n, i in enumerate(taps)
    }
    modules = dict(trunk.named_modules())
    shapes = {name: getattr(modules.get(name), "normalized_shape", None) for name in ("head.norm", "fc_norm")}
    norm = next((name for name, shape in shapes.items() if shape and tuple(shape) == (last.width,)), None)
    classifiers = trunk.default_cfg.get("classifier", ())
    return FeatureInfo(
        {**levels, "c5": last},
        tuple(f"{prefix}." for prefix in ([classifiers] if isinstance(classifiers, str) else classifiers)),
        final_norm=norm,
        norm_reads_rows=norm is not None and not type(modules[norm]).__name__.endswith("2d"),
        token=getattr(trunk, "cls_token", None) is not None,
        taps=taps,
        layers=_layers(trunk),
    )


def _layers(trunk: Any) -> Layers:
    """Parameter names by layer, as timm groups them for its own layer-wise rates; without such groups a child is a layer."""
    if not hasattr(trunk, "group_matcher"):
        return tuple((name,) for name, _ in trunk.named_children())
    from timm.models import group_parameters

    # timm's groups are of a network with its head, and a trunk has none: this name takes its place.
    names, head = [name for name, _ in trunk.named_parameters()], "a head, which no group of the trunk matches"
    whole: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in (*names, head)))
    found = group_parameters(whole, trunk.group_matcher(coarse=False), reverse=True)
    return tuple(tuple(name for name in names if found[name] == layer) for layer in range(found[head]))


def unused_parameters(
    name: str, backbone: nn.Module, widths: dict[str, int], channels: int, image_size: int
) -> frozenset[str]:
    """Names of the parameters that no map depends on, such as those of the classifier alone.

    Shapes are followed on the meta device, where nothing is computed: some of timm's networks give other maps than they
    declare, and some take no images of this size.

    Raises:
        ConfigError: the backbone does not give a map of its declared width for each level.
    """
    parameters = {key: value.detach().to("meta").requires_grad_() for key, value in backbone.named_parameters()}
    state = parameters | {key: buffer.to("meta") for key, buffer in backbone.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            images = torch.empty(2, channels, image_size, image_size, device="meta")
            maps: dict[str, Tensor] = functional_call(backbone, state, (images,))
        wrong = [key for key, width in widths.items() if maps[key].ndim != 4 or maps[key].shape[:2] != (2, width)]
        problem = f"its level {wrong[0]} is not what it declares" if wrong else ""
    except Exception as error:  # whatever timm's code raises
        problem = first_line(error)
    if problem:
        own: Any = getattr(backbone.trunk, "default_cfg", {}).get("input_size", ())
        raise ConfigError(
            f"`backbone.name`: {name} gives no feature maps of images of {image_size} px ({problem}). Its own size is "
            f"{own[-1] if own else 'not known'} px. Where that does not help, take a network of another family."
        )
    with torch.enable_grad():
        total = torch.stack([part.sum() for part in maps.values()]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return frozenset(key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None)


def timm_maps(trunk: Any, info: FeatureInfo, images: Tensor) -> dict[str, Tensor]:
    """Images (B, C, H, W) to a map (B, width, H ÷ stride, W ÷ stride) per level, and ``token`` where there is one."""
    if not info.taps:
        last, taps = trunk.forward_features(images), []
    else:
        last, taps = trunk.forward_intermediates(images, indices=list(info.taps), output_fmt="NCHW")
    maps = dict(zip(info.levels, taps, strict=False))
    stride = info.levels["c5"].stride
    if last.ndim == 3:
        grid = getattr(trunk.patch_embed, "grid_size", None) or tuple(side // stride for side in images.shape[2:])
        tokens = last[:, getattr(trunk, "num_prefix_tokens", last.shape[1] - math.prod(grid)) :]
        maps["c5"] = tokens.transpose(1, 2).unflatten(2, grid)
        return {**maps, "token": last[:, 0]} if info.token else maps
    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    maps["c5"] = torch.permute(last, (0, 3, 1, 2)) if channels_last else last
    return maps
