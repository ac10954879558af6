"""A finished model from its folder: stage two's weights, its preprocessing and its class names."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.schema import component
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.models.encoder import Card, read
from ssl_pipeline.models.weights import load_strictly
from ssl_pipeline.transforms.preprocessing import Preprocessing


@dataclass
class Model:
    """End to end: decoded images go in, predictions come out. The task is in evaluation mode."""

    task: DownstreamTask
    card: Card
    config: DownstreamConfig

    @property
    def gives(self) -> str:
        return self.config.gives

    @property
    def channels(self) -> int:
        return self.card.blueprint.channels

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The stored values that were black and white in training, of images of more than 8 bits."""
        return self.card.blueprint.range

    @property
    def classes(self) -> tuple[str, ...]:
        assert self.card.classes is not None
        return self.card.classes

    @torch.no_grad()
    def predict(self, images: list[Image.Image]) -> Any:
        return self.task.predict(self.task.prepare(images, Preprocessing.of(self.card.blueprint)))


def load_model(path: str | Path) -> Model:
    """Loads stage two's model from its run's folder, or from its ``model.safetensors``; every key must fit.

    Raises:
        ConfigError: it is not there, not whole, or does not fit.
    """
    card, state = read(path, "model")
    if card.classes is None:
        raise ConfigError(f"the card of {str(path)!r} names no classes.")
    _check_code_is_yours(Path(path), card.config["downstream"])
    encoder, _ = card.blueprint.build()
    config = component("downstream", "downstream", card.config["downstream"])
    assert isinstance(config, DownstreamConfig)
    task = config.build(encoder, len(card.classes))
    task.make_room(state)
    load_strictly(task, state, f"the model in {str(path)!r}")
    return Model(task.eval(), card, config)


def _check_code_is_yours(path: Path, downstream: dict[str, Any]) -> None:
    """Refuses a module that lies beside the weights: a card may only name one of your own."""
    name = str(downstream.get("name"))
    package = name.partition(".")[0]
    found = importlib.util.find_spec(package) if "." in name and package else None
    folder = (path if path.is_dir() else path.parent).resolve()
    origins = [] if found is None else [found.origin, *(found.submodule_search_locations or [])]
    if any(origin is not None and folder in Path(origin).resolve().parents for origin in origins):
        raise ConfigError(
            f"the card of {str(path)!r} names the module `{name}`, which lies beside the weights: code that comes with a model is not "
            "run. If it is yours, move it out of the model's folder."
        )
