"""Anybody's encoder, ready for somebody's images: one of ours, or a network of torchvision's or timm's with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from ssl_pipeline.config.base import ComponentOf, ConfigError, FrozenModel
from ssl_pipeline.config.values import quoted
from ssl_pipeline.data.loader import DistInfo, Preprocessing
from ssl_pipeline.data.pretrained_range import at_range_of
from ssl_pipeline.data.source import SourceConfig
from ssl_pipeline.models.artifact import Card, EncoderSpec, load_encoder, read
from ssl_pipeline.models.backbone import BackboneConfig, is_network
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.weights import WEIGHTS_FILES, load_strictly
from ssl_pipeline.models.weights_input import weights_input
from ssl_pipeline.rng import derive_seed

_SIZE = 224


class EncoderConfig(FrozenModel):
    """Which encoder, and which images.

    Attributes:
        encoder: a run's folder (of stage one, or of stage two, whose encoder is taken), or its ``.safetensors``; or a checkpoint
            of ``backbone.name``, such as lightly's. Null takes ``backbone`` with ``backbone.weights``.
        data: the images.
        backbone: used where the encoder is not one of ours.
        neck: likewise.
        size: likewise, the images' size in pixels; null takes the weights' own where it is known, and 224 where it is not.
        seed: of every draw.
    """

    encoder: str | None = None
    data: Annotated[SourceConfig, ComponentOf("data.sources")]
    backbone: BackboneConfig
    neck: NeckConfig
    size: int | None = Field(None, ge=8)
    seed: int = Field(0, ge=0)

    @property
    def scaled_data(self) -> SourceConfig:
        """The data, at the range of values that the encoder was pretrained at."""
        return at_range_of(self.data, self.encoder)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder in evaluation mode.

    Attributes:
        encoder: on ``share``'s device.
        blueprint: how it is built and fed.
        card: what is known of it; None where it is not one of ours.
        share: one process and its device.
        notes: for the log.
    """

    encoder: Encoder
    blueprint: EncoderSpec
    card: Card | None
    share: DistInfo
    notes: list[str]

    @property
    def preprocessing(self) -> Preprocessing:
        """What the encoder expects of images."""
        return Preprocessing.of(self.blueprint)


def open_encoder(config: EncoderConfig, channels: int, mean: tuple[float, ...] | None = None,
                 std: tuple[float, ...] | None = None) -> LoadedEncoder:  # fmt: skip
    """Opens the encoder that a configuration means.

    Args:
        config: which one.
        channels: of the images that it will see.
        mean: of the images, for a network without weights.
        std: likewise.

    Raises:
        ConfigError: it is not there, damaged, of another architecture, or reads images of other channels.
    """
    notes = list[str]()
    card = None
    if config.encoder is None or _is_checkpoint(config.encoder):
        backbone = config.backbone if config.encoder is None else _with_weights(config.backbone, config.encoder)
        expected = weights_input(backbone, channels, mean, std)
        size = config.size or expected.size or _SIZE
        blueprint = EncoderSpec(
            backbone=backbone, neck=config.neck, channels=channels, size=size, mean=expected.mean, std=expected.std,
            resize=expected.resize_at(size),
        )  # fmt: skip
        torch.manual_seed(
            derive_seed(config.seed, "initialisation")
        )  # decides a network without weights, and nothing else
        encoder, notes = blueprint.build()
        notes = [*expected.notes(size), *notes]
        if backbone.weights is None:
            notes.append(f"{backbone.name} has random weights: give an encoder, or `backbone.weights`")
    else:
        encoder, card = _ours(config.encoder)
        blueprint = card.blueprint
    if blueprint.channels != channels:
        raise ConfigError(
            f"the encoder in {config.encoder!r} reads {blueprint.channels} channel(s), and the images have {channels}: set "
            f"`data.channels={blueprint.channels}` where the source has that key."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedEncoder(encoder.to(device).eval(), blueprint, card, DistInfo(0, 1, device), notes)


def _is_checkpoint(path: str) -> bool:
    """Whether it is a file of tensors without a card of ours beside it."""
    file = Path(path).expanduser()
    ours = file.name == "card.json" or (
        file.name in ("encoder.safetensors", "model.safetensors") and (file.parent / "card.json").exists()
    )
    return not ours and not file.is_dir() and (file.is_file() or path.endswith(WEIGHTS_FILES))


def _with_weights(backbone: BackboneConfig, path: str) -> BackboneConfig:
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"there is no file {path!r}: give a run's folder, or a checkpoint of `backbone.name`.")
    if backbone.name == "small_resnet" and backbone == BackboneConfig():
        raise ConfigError(
            f"{path!r} is a checkpoint without a card of ours: say of which network by `backbone.name=resnet50` or another."
        )
    return backbone.model_copy(update={"weights": path})


def _ours(path: str) -> tuple[Encoder, Card]:
    folder = Path(path).expanduser()
    if not folder.exists() and is_network(path):
        raise ConfigError(
            f"`encoder`: there is no run {path!r}, and a network has that name. Its published weights are taken by "
            f"backbone.name={path} backbone.weights=DEFAULT, without an encoder."
        )
    file = folder / "model.safetensors" if folder.is_dir() else folder
    if file.name != "model.safetensors" or not file.exists():
        return load_encoder(folder)
    card, state = read(file, "model")
    encoder, _ = card.blueprint.without_weights().build()
    inside = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    load_strictly(encoder, inside, f"the encoder of the model in {path!r}")
    return encoder, card


def describe_encoder(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A command's leading words that are no overrides, as overrides of these keys: ``RUN data=…`` is ``encoder=RUN data=…``."""
    words, named = list(words), list[str]()
    for key in keys:
        if not words or words[0].startswith("-") or ("=" in words[0] and not Path(words[0]).exists()):
            break
        named.append(f"{key}={quoted(words.pop(0))}")
    return [*named, *words]
