"""The encoder that a command is given, ready for its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from ssl_pipeline.config.base import ComponentOf, FrozenModel
from ssl_pipeline.config.values import quoted
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.source import SourceConfig, at_range_of
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.build_encoder import BuiltEncoder, build_encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing


class EncoderConfig(FrozenModel):
    """Which encoder, and which images.

    Attributes:
        encoder: a run's folder (of stage one, or of stage two, whose encoder is taken), or its ``.safetensors``; or a checkpoint
            of ``backbone.name``, such as lightly's. Null takes ``backbone`` with ``backbone.weights``.
        data: the images.
        backbone: used where the encoder is not one of ours.
        neck: the same.
        size: the images' size in pixels; null takes the encoder's own, or the weights' where it is known, and 224 where it is not.
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
        return at_range_of(self.data, self.encoder)


@dataclass(frozen=True)
class LoadedEncoder(BuiltEncoder):
    """An encoder in evaluation mode, on the device of ``share``, a single process."""

    share: DistInfo

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of(self.blueprint)


def open_encoder(config: EncoderConfig, images: IndexedDataset) -> LoadedEncoder:
    """The encoder of a configuration, for images that it is to see; see :func:`build_encoder`."""
    built = build_encoder(config.encoder, config.backbone, config.neck, images, config.size, config.seed)
    notes, device = built.notes, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if built.card is None and built.blueprint.backbone.weights is None:
        notes = [*notes, f"{config.backbone.name} has random weights: give an encoder, or `backbone.weights`"]
    return LoadedEncoder(built.encoder.to(device).eval(), built.blueprint, built.card, notes, DistInfo(0, 1, device))


def describe_encoder(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A command's leading words that are no overrides, as overrides of these keys: ``RUN data=…`` is ``encoder=RUN data=…``."""
    words, named = list(words), list[str]()
    for key in keys:
        if not words or words[0].startswith("-") or ("=" in words[0] and not Path(words[0]).exists()):
            break
        named.append(f"{key}={quoted(words.pop(0))}")
    return [*named, *words]
