"""``ssl-pipeline views``: a picture of the random views, to look at before a night is spent on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import ConfigDict, Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, Room, Strict
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.loader import Preprocessing, open_or_neighbour
from ssl_pipeline.data.source import Indexed, SourceConfig
from ssl_pipeline.views.policy import Views, ViewsConfig


class PictureConfig(Strict):
    """Which data and which views; ``pretrain``'s other keys are read over.

    Attributes:
        rows: images.
        epochs: pairs of views of an image, side by side.
        output: the picture's file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    data: Annotated[SourceConfig, Room("data.sources")]
    views: ViewsConfig
    seed: int = 0
    rows: int = Field(8, ge=1)
    epochs: int = Field(4, ge=1)
    output: str | None = None


def draw(config: PictureConfig) -> Path:
    """Saves a picture: each row an image, first as evaluation sees it, then its views of the first epochs."""
    source = config.data.open("train")
    assert source is not None
    settled, _ = config.views.for_channels(source.channels)
    neutral = (0.0,) * source.channels, (1.0,) * source.channels
    views = Views(settled, *neutral, config.seed)
    index = torch.arange(min(config.rows, len(source)))
    columns = [_plain(source, index, Preprocessing(settled.size, *neutral))]
    for epoch in range(min(config.epochs, 4)):
        if source.pixels is not None:
            crops = views.of_pixels(source.pixels[index], index, epoch)
        else:
            crops = views.of_files([open_or_neighbour(source, int(i)) for i in index], index, epoch)
        columns += views.finish(crops, index, epoch)
    path = Path(config.output or "views.png")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"`output`: {str(path)!r} is no picture's name: end it in .png.")
    _grid(columns).save(path)
    return path


def _plain(source: Indexed, index: Tensor, preprocessing: Preprocessing) -> Tensor:
    if source.pixels is not None:
        return preprocessing.of_pixels(source.pixels[index])
    return preprocessing.of_files([open_or_neighbour(source, int(i)) for i in index])


def _grid(columns: list[Tensor], gap: int = 4) -> Image.Image:
    """Columns of (rows, C, S, S) in [0, 1] as one picture, small images enlarged."""
    size = columns[0].shape[-1]
    zoom = max(1, 96 // size)
    cell = size * zoom + gap
    picture = Image.new("RGB", (cell * len(columns) + gap, cell * len(columns[0]) + gap), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            values = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            tile = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).convert("RGB")
            tile = tile.resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (gap + x * cell, gap + y * cell))
    return picture


def main() -> None:
    """The command line."""
    run_command("pretrain", PictureConfig, lambda config: print_path(draw(config)))


def print_path(path: Path) -> None:
    """Says where the picture is."""
    import sys

    sys.stdout.write(f"wrote {path}\n")
