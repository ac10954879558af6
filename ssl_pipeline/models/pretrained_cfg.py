"""The images that published weights expect: mean, std, size and resize, as torchvision, timm or a card of ours say."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchvision.models import get_model_weights

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import read_card
from ssl_pipeline.models.timm_backbones import pretrained_tags, timm_name, with_tag
from ssl_pipeline.models.torchvision_backbones import torchvision_names
from ssl_pipeline.models.weights import official_entry
from ssl_pipeline.transforms.preprocessing import Resize


@dataclass(frozen=True)
class PretrainedCfg:
    """The images that weights expect.

    Attributes:
        mean: per channel, of values in [0, 1].
        std: per channel.
        size: height and width in pixels; None where it is not known, or not square.
        resize: how evaluation brings an image to that size; None where it is not known.
        origin: who says so, for the log; empty where it is the data's own.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    resize: Resize | None = None
    origin: str = ""

    def resize_at(self, size: int) -> Resize | None:
        """The published resize, which belongs to the published size alone."""
        return self.resize if size == self.size else None

    def for_channels(self, channels: int) -> PretrainedCfg:
        """For other images than RGB: the mean of the three means and of the three stds in each channel."""
        if channels == len(self.mean):
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * channels, std=(std,) * channels)

    def notes(self, size: int, evaluated: bool = True) -> list[str]:
        """Lines for the log; of weights that are not ``evaluated`` but trained on, without the resize."""
        if not self.origin:
            return []
        line = f"backbone: mean {_numbers(self.mean)} and std {_numbers(self.std)}, {self.origin}"
        resize = self.resize_at(size)
        if not evaluated or self.size is None:
            return [line]
        if resize is not None:
            return [f"{line}; {resize.describe(size)}"]
        return [
            f"{line}; these weights were made for {self.size} px (size={self.size}): at {size} px the largest central square is resized"
        ]


IMAGENET = PretrainedCfg((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), origin="ImageNet's, as nothing else is known")


def resolve_cfg(
    config: BackboneConfig, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> PretrainedCfg:
    """The images that an encoder will expect: those of its weights, or of the data (``mean`` and ``std``) where it has none."""
    if config.weights is None and mean is not None and std is not None:
        return PretrainedCfg(mean, std)
    found = published_cfg(config) if config.weights is not None else None
    return (found or IMAGENET).for_channels(channels)


def published_cfg(config: BackboneConfig) -> PretrainedCfg | None:
    """What the publisher of weights says of their images; None for most files.

    Of a file it is known where a card of ours or a ``config.json`` of the Hugging Face Hub lies in its folder, where it has the name that
    torchvision publishes it under, where ``backbone.name`` has a pretrained tag of timm's (``timm/NAME.TAG``), or where timm has
    only one for that network.
    """
    assert config.weights is not None
    if config.official:
        if config.is_timm:
            cfg = _registered(with_tag(timm_name(config.name), config.official))
            return _of_timm(cfg, f"{cfg['tag']}'s own")
        return _of_torchvision(official_entry(config.name, config.official))
    path = Path(config.weights).expanduser()
    card = path.parent / "card.json"
    if path.name in ("encoder.safetensors", "model.safetensors") and card.is_file():
        spec = read_card(card, "encoder" if path.stem == "encoder" else "model").blueprint
        return PretrainedCfg(spec.mean, spec.std, spec.size, spec.resize, f"as {card} has them")
    if config.is_timm:
        return _of_timms_file(timm_name(config.name), path)
    # A file from torchvision's server has its digest in its name.
    entries = get_model_weights(config.name) if config.name in torchvision_names() else ()
    return next((_of_torchvision(entry) for entry in entries if path.name == entry.url.rsplit("/", 1)[-1]), None)


def _of_torchvision(entry: Any) -> PretrainedCfg:
    transforms = entry.transforms()
    (size,), (resize_size,) = transforms.crop_size, transforms.resize_size
    resize = Resize(resize_size=resize_size, interpolation=transforms.interpolation.value)
    return PretrainedCfg(tuple(transforms.mean), tuple(transforms.std), size, resize, f"{entry.name}'s own")


def _of_timms_file(name: str, path: Path) -> PretrainedCfg | None:
    hub = path.parent / "config.json"
    if hub.is_file():
        try:
            tree = json.loads(hub.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"`backbone.weights`: {str(hub)!r} can't be read ({error}): mend or remove it."
            ) from error
        if isinstance(tree, dict) and isinstance(tree.get("pretrained_cfg"), dict):
            return _of_timm(tree["pretrained_cfg"], f"as {hub} has them")
    tags = pretrained_tags(name)
    tag = tags[0] if len(tags) == 1 else name.partition(".")[2]
    return _of_timm(_registered(with_tag(name, tag)), f"those of timm's tag {tag!r}") if tag else None


def _registered(name: str) -> dict[str, Any]:
    """What timm publishes beside pretrained weights, of a network's name with a tag."""
    import timm

    cfg: Any = timm.get_pretrained_cfg(name)
    found: dict[str, Any] = cfg.to_dict()
    return found


def _of_timm(cfg: dict[str, Any], origin: str) -> PretrainedCfg:
    import timm.data

    library: Any = timm.data
    found: dict[str, Any] = library.resolve_data_config({}, pretrained_cfg=cfg)  # fills in timm's defaults
    _, height, width = found["input_size"]
    size = height if height == width else None
    resize = None
    if size is not None:
        resize = Resize(
            resize_size=int(size / found["crop_pct"]),
            interpolation=found["interpolation"],
            crop_mode=found["crop_mode"],
        )
    return PretrainedCfg(tuple(found["mean"]), tuple(found["std"]), size, resize, origin)


def _numbers(values: tuple[float, ...]) -> str:
    """One number where all channels have the same."""
    shown = [f"{value:.3g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else f"({', '.join(shown)})"
