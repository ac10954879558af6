"""The hand-over: weights as safetensors and a card that says what they are, written whole or not at all."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
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
from ssl_pipeline.models.backbone import BackboneConfig, stem_at
from ssl_pipeline.models.encoder import Encoder, build_encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.weights import load_strictly
from ssl_pipeline.transforms.preprocessing import Resize

SCHEMA = 1
_CARD = "card.json"
_log = logging.getLogger("ssl_pipeline")


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that are finite numbers: nothing else can be compared, drawn or written as JSON.

    The name of each one that is left out is logged once.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            _say_absent(name)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


@cache
def _say_absent(name: str) -> None:
    _log.warning(
        "%s is not a finite number and is left out: there are too few images to measure it, or the features are not finite.",
        name,
    )


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
        """The encoder, with official weights if the blueprint names some, and notes for the log."""
        return build_encoder(self.backbone, self.neck, self.channels, self.size)

    def without_weights(self) -> EncoderSpec:
        # Under `auto` given weights decide the stem; without them the choice has to be written down.
        decided = self.backbone.stem == "auto" and self.backbone.weights is not None
        # small_resnet has its small stem under `auto` whatever its weights; both stems have kernels of one shape, so
        # that the wrong one would load without a word.
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
    """What the weights beside it are.

    Attributes:
        schema_version: of this card.
        kind: ``encoder`` (stage one) or ``model`` (stage two).
        blueprint: architecture and preprocessing.
        config: the whole configuration of the run.
        data: name, fingerprint and license of what it learned from.
        figures: measured ones; those that are not finite are left out.
        versions: of what made it.
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


def save(folder: Path, module: nn.Module, card: Card) -> Path:
    """Writes ``<kind>.safetensors`` and ``card.json``; the card last, so that a card always has its weights.

    Returns:
        The weights' path.
    """
    weights = folder / f"{card.kind}.safetensors"
    temporary = weights.with_suffix(".safetensors.partial")
    # Cloned: the format takes neither strided (channels-last) tensors nor two that share their memory.
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    save_file(state, temporary)
    _publish(temporary, weights)
    write_card(folder, card)
    return weights


def write_card(folder: Path, card: Card) -> None:
    """Writes ``card.json`` beside weights that are there, with the time."""
    stamped = card.model_copy(update={"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    temporary = folder / f"{_CARD}.partial"
    temporary.write_text(stamped.model_dump_json(indent=1))
    _publish(temporary, folder / _CARD)


def _publish(temporary: Path, final: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def read(path: str | Path, kind: Literal["encoder", "model"]) -> tuple[Card, dict[str, Tensor]]:
    """Reads a card and its weights.

    Args:
        path: a run's folder, or the weights' file in it.
        kind: what is expected.

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
        schema = tree.get("schema_version") if isinstance(tree, dict) else None
        if schema is not None and schema != SCHEMA:  # before its fields, which another schema may well lack
            raise ConfigError(
                f"{path} is of schema {schema}, and this version reads schema {SCHEMA}: read it with the version of "
                "ssl-pipeline that wrote it, or run its stage again."
            )
        card = Card.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(
            f"{path} can't be read by this version (schema {SCHEMA}): {where}: {first['msg']}. Run its stage again."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): take it from a copy, or run its stage again.") from error
    if card.kind != kind:
        raise ConfigError(
            f"{path} describes a {card.kind}, and a {kind} is needed: give the folder of a run that wrote one."
        )
    return card


def load_encoder(path: str | Path) -> tuple[Encoder, Card]:
    """Stage one's encoder, every key accounted for.

    Raises:
        ConfigError: see :func:`read`; or naming the keys that do not fit.
    """
    card, state = read(path, "encoder")
    encoder, _ = card.blueprint.without_weights().build()
    load_strictly(encoder, state, f"the encoder in {str(path)!r}")
    return encoder, card
