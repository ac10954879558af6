"""What is exported: an encoder, or a whole model, with its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.models.encoder import Card, Encoder, load_encoder

Part = Literal["model", "encoder"]


@dataclass(frozen=True)
class ExportBundle:
    """What is exported, in evaluation mode.

    Attributes:
        encoder: the encoder.
        task: encoder and head; None for the encoder alone.
        card: without paths of this machine.
        gives: what a model's prediction is; see :class:`DownstreamConfig`.
    """

    encoder: Encoder
    task: DownstreamTask | None
    card: Card
    gives: str = "features"

    @property
    def module(self) -> nn.Module:
        return self.encoder if self.task is None else self.task

    def run(self, images: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) to features (B, D), logits (B, classes) or (B, classes, H, W), or values (B, K)."""
        return self.encoder.features(images) if self.task is None else self.task.predict(images)

    def example(self, count: int = 2, seed: int = 0) -> Tensor:
        """Normalized noise in the shape of the images, to trace and to compare with."""
        blueprint = self.card.blueprint
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, blueprint.channels, blueprint.size, blueprint.size, generator=generator)


def open_parts(path: str | Path, part: Part | None = None) -> ExportBundle:
    """Opens a run's folder, or the ``.safetensors`` in it: all that is there, or of a model its encoder alone.

    Raises:
        ConfigError: it is not there, or not whole, or a model is asked of an encoder.
    """
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    has_model = (folder / "model.safetensors").exists() and place.name != "encoder.safetensors"
    if part == "model" and not has_model:
        raise ConfigError(f"{str(path)!r} holds an encoder and no model: `ssl-pipeline finetune` makes one of it.")
    if has_model and part != "encoder":
        model = load_model(place)
        assert isinstance(model.task.encoder, Encoder)
        return ExportBundle(model.task.encoder, model.task, _public(model.card), model.gives)
    encoder, card = load_encoder(place)
    return ExportBundle(encoder.eval(), None, _public(card.model_copy(update={"kind": "encoder", "classes": None})))


def _public(card: Card) -> Card:
    """The card without secrets and without places on this machine: a path keeps its last name."""
    blueprint = card.blueprint.without_weights()
    private = {"config": _without_places(redact(card.config)), "data": _without_places(card.data)}
    return card.model_copy(update={**private, "blueprint": blueprint})


def _without_places(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_places(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_places(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and tree.startswith(("/", "~", "./", "../")) else tree
