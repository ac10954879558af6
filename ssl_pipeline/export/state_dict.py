"""Weights under torchvision's or timm's own names, which these libraries load strictly."""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.export.graph import TOLERANCE
from ssl_pipeline.export.parts import ExportBundle
from ssl_pipeline.models.torchvision_backbones import feature_info, first_convolution, remove_classifier

Library = Literal["torchvision", "timm"]


def write_state_dict(parts: ExportBundle, path: Path, library: Library) -> list[str]:
    """Writes a ``.safetensors`` of a network that the library builds by name, after having loaded it there.

    A model's linear head becomes the library's classifier. Kernels for grayscale images are divided over RGB, so that a
    grayscale image in three equal channels gives the same output.

    Returns:
        How to load it, and notes.

    Raises:
        ConfigError: the library has no such network, or it would compute something else.
    """
    card, notes = parts.card, list[str]()
    name = card.blueprint.backbone.name.removeprefix("timm/")
    theirs = _build(library, name, parts)
    state = dict(parts.encoder.backbone.trunk.state_dict())
    if parts.task is not None:
        state |= _classifier(parts, theirs, library)
    if card.blueprint.channels == 1:
        key = f"{first_convolution(theirs)[0]}.weight"
        state[key] = state[key].expand(-1, 3, -1, -1) / 3
        notes.append("kernels for grayscale images were divided over three channels: feed grayscale images as RGB")
    _load(theirs, state, name, library)
    if parts.task is None and card.blueprint.neck.name not in ("gap", "tokens"):
        notes.append(f"the neck {card.blueprint.neck.name!r} is not in it: no library's network has one")
    else:
        notes += _compare(parts, theirs, library)
    stored = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    facts = {"classes": card.classes, **card.blueprint.model_dump(include={"mean", "std", "size", "resize"})}
    about = {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    save_file(stored, path, {"format": "pt", "made_by": "ssl_pipeline", "backbone": name, **about})
    return [*_how_to_load(parts, library, name, path), *notes]


def _build(library: Library, name: str, parts: ExportBundle) -> Any:
    """The library's network: with as many classes as the model, or without its classifier."""
    backbone, classes = parts.card.blueprint.backbone, len(parts.card.classes or ())
    bound = parts.encoder.backbone.fixed_input  # transformers are made for one size
    options: dict[str, Any] = {"num_classes": classes} if classes else {}
    if backbone.name == "small_resnet":
        raise ConfigError(
            f"small_resnet is a network of ours, and {library} has none of that name: export --to torch.export, onnx or "
            "safetensors."
        )
    if library == "torchvision":
        if backbone.is_timm:
            raise ConfigError(f"{backbone.name} is timm's, not torchvision's: export --to timm.")
        if bound is not None:
            options["image_size"] = bound
        network: nn.Module = get_model(name, **options)
        if not classes:
            remove_classifier(network, feature_info(network, name))
        return network.eval()
    if importlib.util.find_spec("timm") is None:
        raise ConfigError('`--to timm` needs timm: pip install -e ".[timm]" in the project\'s folder.')
    import timm

    if not timm.is_model(name.split(".")[0]):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ConfigError(f"timm has no network named {name!r} (nearest: {close or 'none'}): export --to torchvision.")
    if backbone.is_timm and bound is not None:
        options["img_size"] = bound
    return timm.create_model(name, **{"num_classes": 0, **options}).eval()


def _classifier(parts: ExportBundle, theirs: Any, library: Library) -> dict[str, Tensor]:
    """The head under the name of the library's classifier."""
    task = parts.task
    assert task is not None
    if not isinstance(task.head, nn.Linear) or not isinstance(task.bottleneck, nn.Identity):
        raise ConfigError(
            f"the head is no single linear layer, and {library}'s networks end in one: export --part encoder, or the whole "
            "model --to torch.export or onnx."
        )
    if library == "timm":
        names = [theirs.default_cfg["classifier"]]
    else:
        prefixes = feature_info(theirs, parts.card.blueprint.backbone.name).classifier
        linear = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)]
        names = [name for name in linear if f"{name}.".startswith(prefixes)]
    if len(names) != 1 or theirs.get_submodule(names[0]).weight.shape != task.head.weight.shape:
        raise ConfigError(
            f"{library}'s {parts.card.blueprint.backbone.name} has another classifier than one linear layer on "
            f"{task.head.weight.shape[1]} features: export --part encoder, or --to torch.export or onnx."
        )
    return {f"{names[0]}.weight": task.head.weight, f"{names[0]}.bias": task.head.bias}


def _load(theirs: nn.Module, state: dict[str, Tensor], name: str, library: Library) -> None:
    own, stem = theirs.state_dict(), f"{first_convolution(theirs)[0]}.weight"
    shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (own, state)]
    odd = [key for key in sorted(own.keys() | state.keys()) if shapes[0].get(key) != shapes[1].get(key)]
    if odd == [stem]:
        raise ConfigError(
            f"the encoder has the stem for small images ({stem}), which {library} builds under no name: export --to torch.export, "
            "onnx or safetensors, or pretrain with backbone.stem=imagenet."
        )
    if odd:
        raise ConfigError(
            f"{library}'s {name} has other tensors than this encoder ({', '.join(odd[:3])}{', …' if len(odd) > 3 else ''}): export "
            "--to the library that the backbone is from, or to torch.export, onnx or safetensors."
        )
    theirs.load_state_dict(state)


@torch.no_grad()
def _compare(parts: ExportBundle, theirs: nn.Module, library: Library) -> list[str]:
    """Whether the library's network computes what ours does."""
    images = parts.example()
    rgb = images.expand(-1, 3, -1, -1) if parts.card.blueprint.channels == 1 else images
    expected, found = parts.run(images), theirs(rgb)
    far = float("inf")
    if expected.shape == found.shape:
        far = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    if far <= TOLERANCE:
        return []
    if parts.task is None:
        return [f"{library} pools or normalizes otherwise: its network gives other features than this encoder"]
    raise ConfigError(
        f"{library}'s network computes other values with these weights (by {far:.1e}): a neck or a stem of its own stands "
        "between. Export --to torch.export or onnx."
    )


def _how_to_load(parts: ExportBundle, library: Library, name: str, path: Path) -> list[str]:
    """Lines of Python that build and load it."""
    classes, backbone = len(parts.card.classes or ()), parts.encoder.backbone
    size = f"={backbone.fixed_input}" if backbone.fixed_input is not None else ""
    if library == "timm":
        bound = f", img_size{size}" if size else ""
        made = f'timm.create_model("{name}", num_classes={classes}{bound}, checkpoint_path="{path}")'
        return ["import timm", f"model = {made}"]
    bound = f", image_size{size}" if size else ""
    counted = f", num_classes={classes}" if classes else ""
    lines = ["import torch, torchvision", "from safetensors.torch import load_file"]
    lines.append(f'model = torchvision.models.get_model("{name}"{counted}{bound})')
    if not classes:
        owner, _, child = feature_info(backbone.trunk, name).classifier[0].rstrip(".").partition(".")
        lines.append(f"model.{owner}{f'[{child}]' if child else ''} = torch.nn.Identity()")
    return [*lines, f'model.load_state_dict(load_file("{path}"))']
