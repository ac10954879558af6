"""What stage two starts from."""

from __future__ import annotations

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.models.artifact import EncoderSpec, load_encoder
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.weights_input import weights_input


def pretrained_encoder(path: str, pool: IndexedDataset, size: int | None) -> tuple[EncoderSpec, Encoder]:
    """Stage one's encoder and its architecture.

    Args:
        path: of its artifact.
        pool: the images it is to read.
        size: their height and width in pixels; None takes those that it was pretrained on.

    Raises:
        ConfigError: it can't be loaded, or reads other images.
    """
    encoder, card = load_encoder(path)
    blueprint = card.blueprint.without_weights()
    check_channels(blueprint, f"the encoder in {path!r}", pool)
    bound = encoder.backbone.fixed_input
    if size is not None and bound not in (None, size):
        raise ConfigError(
            f"`size`: {blueprint.backbone.name} is bound to images of {bound} px, those that it was pretrained on, and {size} was "
            "asked for: leave `size` out, or pretrain a convolutional network."
        )
    return (blueprint if size is None else blueprint.at_size(size)), encoder


def check_channels(blueprint: EncoderSpec, name: str, pool: IndexedDataset) -> None:
    """Refuses images that a network can't read.

    Raises:
        ConfigError: they have another number of channels.
    """
    if blueprint.channels != pool.channels:
        raise ConfigError(
            f"{name} reads {blueprint.channels} channel(s), and {pool.name} has {pool.channels}: set `data.channels` or pretrain on "
            "such images."
        )


def new_encoder(
    backbone: BackboneConfig, neck: NeckConfig, pool: IndexedDataset, size: int
) -> tuple[EncoderSpec, Encoder, list[str]]:
    """An encoder of published weights or with fresh ones, its architecture, and notes for the log.

    Raises:
        ConfigError: an unknown name, weights that do not fit, or a size that the network can't take.
    """
    expected = weights_input(backbone, pool.channels, pool.mean, pool.std)
    blueprint = EncoderSpec(
        backbone=backbone, neck=neck, channels=pool.channels, size=size, mean=expected.mean, std=expected.std,
        resize=expected.resize_at(size), range=pool.value_range,
    )  # fmt: skip
    encoder, notes = blueprint.build()
    return blueprint.without_weights(), encoder, [*expected.notes(size), *notes]
