"""Builds an encoder: of a finished run, of a checkpoint, with published weights, or with fresh ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.models.backbone import BackboneConfig, is_network
from ssl_pipeline.models.encoder import Card, Encoder, EncoderSpec, load_encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.pretrained_cfg import resolve_cfg
from ssl_pipeline.models.weights import WEIGHTS_FILES
from ssl_pipeline.rng import derive_seed

_SIZE = 224


@dataclass(frozen=True)
class BuiltEncoder:
    """An encoder on the CPU, how it is built and fed, the card of the run that wrote it (None if none of ours did), and notes."""

    encoder: Encoder
    blueprint: EncoderSpec
    card: Card | None
    notes: list[str]


def build_encoder(
    path: str | None,
    backbone: BackboneConfig,
    neck: NeckConfig,
    images: ImageDataset,
    size: int | None = None,
    seed: int | None = None,
    evaluated: bool = True,
) -> BuiltEncoder:
    """Builds the encoder that a configuration means.

    Args:
        path: a run's folder (of stage one, or of stage two, whose encoder is taken) or its ``.safetensors``; or a checkpoint of
            ``backbone``. None takes ``backbone`` with its weights.
        backbone: the network, where the encoder is not one of ours.
        neck: how its maps become features, where the encoder is not one of ours.
        images: that it will read.
        size: their height and width in pixels; None takes those that the weights were trained on, or 224.
        seed: of fresh weights; None leaves torch's generator alone.
        evaluated: whether the weights are measured as they are, by their own resize, rather than trained on.

    Raises:
        ConfigError: it is not there, damaged, of another architecture, or reads other images.
    """
    if path is not None and not _is_checkpoint(path):
        return _of_run(path, images, size)
    if path is not None:
        backbone = _with_weights(backbone, path)
    expected = resolve_cfg(backbone, images.channels, images.mean, images.std)
    size = size or expected.size or _SIZE
    blueprint = EncoderSpec(
        backbone=backbone, neck=neck, channels=images.channels, size=size, mean=expected.mean, std=expected.std,
        resize=expected.resize_at(size) if evaluated else None, range=images.value_range,
    )  # fmt: skip
    if seed is not None:
        torch.manual_seed(derive_seed(seed, "initialisation"))
    encoder, notes = blueprint.build()
    return BuiltEncoder(encoder, blueprint, None, [*expected.notes(size, evaluated), *notes])


def _of_run(path: str, images: ImageDataset, size: int | None) -> BuiltEncoder:
    if not Path(path).expanduser().exists() and is_network(path):
        raise ConfigError(
            f"`encoder`: there is no run {path!r}, and a network has that name. Its published weights are taken by "
            f"backbone.name={path} backbone.weights=DEFAULT, without an encoder."
        )
    encoder, card = load_encoder(path)
    blueprint = card.blueprint.without_weights()
    check_channels(blueprint, f"the encoder in {path!r}", images)
    bound = encoder.backbone.fixed_input
    if size is not None and bound not in (None, size):
        raise ConfigError(
            f"`size`: {blueprint.backbone.name} is bound to images of {bound} px, those that it was pretrained on, and {size} was "
            "asked for: leave `size` out, or pretrain a convolutional network."
        )
    return BuiltEncoder(encoder, blueprint if size is None else blueprint.at_size(size), card, [])


def check_channels(blueprint: EncoderSpec, name: str, images: ImageDataset) -> None:
    """Raises a ConfigError where the images have another number of channels than a network reads."""
    if blueprint.channels != images.channels:
        raise ConfigError(
            f"{name} reads {blueprint.channels} channel(s), and {images.name} has {images.channels}: set "
            f"`data.channels={blueprint.channels}` where the source has that key, or pretrain on such images."
        )


def _is_checkpoint(path: str) -> bool:
    """Whether it is a file of tensors without a card of ours beside it."""
    file = Path(path).expanduser()
    ours = file.name in ("encoder.safetensors", "model.safetensors") and (file.parent / "card.json").exists()
    if ours or file.name == "card.json" or file.is_dir():
        return False
    return file.is_file() or path.endswith(WEIGHTS_FILES)


def _with_weights(backbone: BackboneConfig, path: str) -> BackboneConfig:
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"there is no file {path!r}: give a run's folder, or a checkpoint of `backbone.name`.")
    if backbone == BackboneConfig():
        raise ConfigError(
            f"{path!r} is a checkpoint without a card of ours: say of which network by `backbone.name=resnet50` or another."
        )
    return backbone.model_copy(update={"weights": path})
