"""A finished model from its folder: stage two's weights, its preprocessing and its class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.resolve import component
from ssl_pipeline.data.loader import Preprocessing
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.model.artifact import Card, read
from ssl_pipeline.model.weights import load_strictly


@dataclass
class Model:
    """End to end: decoded images go in, predictions come out.

    Attributes:
        task: encoder and head, in evaluation mode.
        card: what it is.
    """

    task: DownstreamTask
    card: Card

    @property
    def channels(self) -> int:
        """How images must be decoded: 1 for grey, 3 for RGB."""
        return self.card.blueprint.channels

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the predictions."""
        assert self.card.classes is not None
        return self.card.classes

    @torch.no_grad()
    def predict(self, images: list[Image.Image]) -> Tensor:
        """The task's predictions for decoded images, one row each."""
        blueprint = self.card.blueprint
        return self.task.predict(Preprocessing(blueprint.size, blueprint.mean, blueprint.std).of_files(images))


def load_model(path: str | Path) -> Model:
    """Loads stage two's model, every key accounted for.

    Args:
        path: a stage-two run's folder, or its ``model.safetensors``.

    Raises:
        ConfigError: it is not there, not whole, or does not fit.
    """
    card, state = read(path, "model")
    if card.classes is None:
        raise ConfigError(f"the card of {str(path)!r} names no classes.")
    encoder, _ = card.blueprint.build()
    config = component("downstream", "downstream", card.config["downstream"])
    assert isinstance(config, DownstreamConfig)
    task = config.build(encoder, len(card.classes))
    load_strictly(task, state, f"the model in {str(path)!r}")
    return Model(task.eval(), card)
