"""The encoder: backbone, then neck. It is what stage one hands to stage two, as safetensors and a card that describes them."""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.config.files import atomic_write, atomic_write_text
from ssl_pipeline.models.backbone import Backbone, BackboneConfig, build_backbone, stem_at
from ssl_pipeline.models.batch_norm import batch_norms
from ssl_pipeline.models.neck import NeckConfig, build_neck
from ssl_pipeline.models.weights import load_strictly
from ssl_pipeline.transforms.preprocessing import Resize

SCHEMA = 1
_CARD = "card.json"
_log = logging.getLogger("ssl_pipeline")


class Encoder(nn.Module):
    """Images to features.

    Attributes:
        width: number of features.
        widths: channels of each level of the maps.
        strides: the image's pixels per pixel of each level.
        keeps_statistics: whether its BatchNorms normalize by their running statistics in training mode too, and keep them.
            Copies of the encoder have the same.
    """

    keeps_statistics: bool = False

    def __init__(self, backbone: Backbone, neck: NeckConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = build_neck(neck, backbone)
        self.width, self.widths, self.strides = self.neck.width, backbone.widths, backbone.strides
        # Some libraries normalize after pooling; what is not the pooled last level has another width, or had its norm.
        self._normalize = neck.name in ("gap", "gem")
        # What the library itself keeps fixed, such as a table of sines, stays so.
        self._never = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        self._never |= {f"backbone.{name}" for name in backbone.unused}
        self.learn()

    def learn(self, maps: bool = False) -> None:
        """Trains the parameters that ``features`` or ``maps`` depend on: several processes would wait for others' gradient."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._never)
        self.backbone.final_norm.requires_grad_(self._normalize and not maps)
        self.neck.requires_grad_(not maps)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        if self.keeps_statistics:
            for norm in batch_norms(self):
                norm.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, width)."""
        features: Tensor = self.neck(self.backbone(images))
        return self.backbone.normalize(features) if self._normalize else features

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to a map (B, widths[level], …) per level, for dense tasks."""
        maps: dict[str, Tensor] = self.backbone(images)
        return {level: maps[level] for level in self.widths}

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """The layer of each parameter by its name, for layer-wise learning rates, and the layer of a head on top.

        As BEiT and MAE number them (Bao et al. 2022; He et al. 2022): stem or embeddings are 0, the blocks 1 to N, and what
        follows the last block (a final norm, the neck) is N + 1, with the head. timm's backbones are grouped as timm groups them.
        """
        layers = self.backbone.layers
        ids = {f"backbone.trunk.{name}": number for number, names in enumerate(layers) for name in names}

        def layer_of(name: str) -> int:
            return ids[name] if name in ids else layer_of(name.rpartition(".")[0]) if "." in name else len(layers)

        return {name: layer_of(name) for name, _ in self.named_parameters()}, len(layers)


class EncoderSpec(FrozenModel):
    """All that is needed to build an encoder, and to feed it.

    Attributes:
        backbone: its network.
        neck: its neck.
        channels: of the images.
        size: of the images, in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        resize: how evaluation brings an image to its size; null takes the largest central square, bilinear.
        range: the stored values that were black and white in images of more than 8 bits; None if there were none.
    """

    backbone: BackboneConfig
    neck: NeckConfig
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize | None = None
    range: tuple[float, float] | None = None

    def build(self) -> tuple[Encoder, list[str]]:
        """The encoder, with official weights if the backbone names some, and notes for the log."""
        backbone, notes = build_backbone(self.backbone, self.channels, self.size)
        return Encoder(backbone, self.neck), notes

    def without_weights(self) -> EncoderSpec:
        """The same architecture with fresh weights."""
        # Under `auto` given weights decide the stem; without them the choice has to be written down.
        decided = self.backbone.stem == "auto" and self.backbone.weights is not None
        # small_resnet has its small stem under `auto` whatever its weights. The kernels of both of its stems have one shape,
        # so that the wrong one would load without an error.
        stem = "small" if self.backbone.name == "small_resnet" else "imagenet"
        update = {"weights": None, "weights_key": None, **({"stem": stem} if decided else {})}
        return self.model_copy(update={"backbone": self.backbone.model_copy(update=update)})

    def at_size(self, size: int) -> EncoderSpec:
        """The same network for images of another size; the stem that the old size chose is written down.

        A resize of published weights belongs to their own size.
        """
        backbone = self.backbone.model_copy(update={"stem": stem_at(self.backbone, self.size)})
        resize = self.resize if size == self.size else None
        return self.model_copy(update={"backbone": backbone, "size": size, "resize": resize})


class Card(FrozenModel):
    """What describes the weights beside it.

    Attributes:
        schema_version: of this card.
        kind: ``encoder`` (stage one) or ``model`` (stage two).
        blueprint: architecture and preprocessing.
        config: the whole configuration of the run.
        data: name, fingerprint and license of the training images.
        figures: the metrics; those that are not finite are left out.
        versions: of the software.
        classes: names, in the order of a model's outputs.
        created: UTC.
    """

    schema_version: int = SCHEMA
    kind: Literal["encoder", "model"]
    blueprint: EncoderSpec
    config: dict[str, Any]
    data: dict[str, str | None]
    figures: dict[str, float]
    versions: dict[str, str]
    classes: tuple[str, ...] | None = None
    created: str = ""

    @field_validator("figures", mode="before")
    @classmethod
    def _finite_figures(cls, value: Any) -> Any:
        """A card is written whatever was measured: weights without it would be lost."""
        return finite(value) if isinstance(value, Mapping) else value


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite numbers: nothing else can be compared, drawn or written as JSON; others are logged once."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            _warn_not_finite(name)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@cache
def _warn_not_finite(name: str) -> None:
    _log.warning(
        "%s is not a finite number and is left out: there are too few images to measure it, or the features are not finite.",
        name,
    )


def save(folder: Path, module: nn.Module, card: Card) -> Path:
    """Writes ``<kind>.safetensors``, then ``card.json``, so that a card always has its weights; returns the weights' path."""
    weights = folder / f"{card.kind}.safetensors"
    # Cloned: the format takes neither strided (channels-last) tensors nor two that share their memory.
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    with atomic_write(weights) as temporary:
        save_file(state, temporary)
    write_card(folder, card)
    return weights


def write_card(folder: Path, card: Card) -> None:
    """Writes ``card.json`` with the time."""
    stamped = card.model_copy(update={"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    atomic_write_text(folder / _CARD, stamped.model_dump_json(indent=1))


def read(path: str | Path, kind: Literal["encoder", "model"]) -> tuple[Card, dict[str, Tensor]]:
    """Reads a card and its weights of a run's folder, or of the weights' file in it.

    Raises:
        ConfigError: it is not there, not whole, or something else.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = folder / f"{kind}.safetensors"
    if not path.exists():
        raise ConfigError(
            f"there is no {str(path)!r}: give the folder of a finished run that holds {weights.name} and {_CARD}."
        )
    if path.is_file() and path.name not in (weights.name, _CARD):
        raise ConfigError(
            f"{str(path)!r} is not named {weights.name}: give that file of a finished run, or its folder; somebody else's checkpoint is "
            "given by backbone.name=NETWORK backbone.weights=FILE, without an encoder."
        )
    for needed in (weights, folder / _CARD):
        if not needed.is_file():
            raise ConfigError(
                f"{str(folder)!r} holds no {needed.name}: it is not the folder of a finished run that wrote one."
            )
    card = read_card(folder / _CARD, kind)
    try:
        return card, load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{weights} is damaged ({error}): take it from a copy, or run its stage again.") from error


def read_card(path: Path, kind: Literal["encoder", "model"]) -> Card:
    """The card, once its schema and kind are known to be those expected."""
    try:
        tree = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): take it from a copy, or run its stage again.") from error
    schema = tree.get("schema_version", SCHEMA) if isinstance(tree, dict) else SCHEMA
    if schema != SCHEMA:  # before its fields, which another schema may well lack
        raise ConfigError(
            f"{path} is of schema {schema}, and this version reads schema {SCHEMA}: read it with the version of "
            "ssl-pipeline that wrote it, or run its stage again."
        )
    try:
        card = Card.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(
            f"{path} can't be read by this version (schema {SCHEMA}): {where}: {first['msg']}. Run its stage again."
        ) from error
    if card.kind != kind:
        raise ConfigError(
            f"{path} describes a {card.kind}, and a {kind} is needed: give the folder of a run that wrote one."
        )
    return card


def load_encoder(path: str | Path) -> tuple[Encoder, Card]:
    """The encoder of a run of stage one, or that in a model of stage two, by its folder or file; every key must fit.

    Raises:
        ConfigError: see :func:`read`; or naming the keys that do not fit.
    """
    place = Path(path).expanduser()
    model = place / "model.safetensors" if place.is_dir() else place
    if model.name == "model.safetensors" and model.exists():
        card, state = read(model, "model")
        state = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    else:
        card, state = read(place, "encoder")
    encoder, _ = card.blueprint.without_weights().build()
    load_strictly(encoder, state, f"the encoder in {str(path)!r}")
    return encoder, card
