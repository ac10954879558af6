"""``ssl-pipeline plot-views``: a picture of the random views, to check before a long run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import ConfigDict, Field
from torch import Tensor

from ssl_pipeline.config.base import ComponentOf, ConfigError, FrozenModel
from ssl_pipeline.config.command import check_folder_of, run_command
from ssl_pipeline.data.build import build_views
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.source import SourceConfig, open_training
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing


class PictureConfig(FrozenModel):
    """Which data and which views; what a recipe says of other things is left aside.

    Attributes:
        data: whose images.
        transform: the policy that is drawn.
        seed: of the images and their views.
        rows: images, spread over the data.
        epochs: sets of views of an image, side by side.
        output: the picture's file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    data: Annotated[SourceConfig, ComponentOf("data.sources")]
    transform: ViewsConfig
    seed: int = 0
    rows: int = Field(8, ge=1)
    epochs: int = Field(4, ge=1, le=32)
    output: str = "views.png"


def draw(config: PictureConfig) -> Path:
    """Saves a picture: each row an image, first as evaluation sees it, then its views of the first epochs."""
    path = Path(config.output).expanduser()
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"`output`: {str(path)!r} is no picture's name: end it in .png.")
    check_folder_of(path, "`output`")
    columns = columns_of(
        open_training(config.data).preview(), config.transform, config.seed, config.rows, config.epochs
    )
    _grid(columns).save(path)
    return path


def columns_of(source: IndexedDataset, config: ViewsConfig, seed: int, rows: int, epochs: int) -> list[Tensor]:
    """A few images as evaluation sees them, then their views of the first epochs.

    The images are drawn by the seed, without repeats: the first of a data set are often of one class, or one camera's.

    Returns:
        1 + ``epochs`` × ``config.total`` tensors of shape (rows, C, S, S) in [0, 1], each with its own S.
    """
    settled, _ = config.for_channels(source.channels)
    neutral = (0.0,) * source.channels, (1.0,) * source.channels
    views, plain = build_views(source, settled, *neutral, seed), Preprocessing(settled.size, *neutral)
    index = permutation(len(source), seed, "picture")[:rows].sort().values
    if source.pixels is not None:
        pixels = source.pixels[index]
        columns = [plain.of_pixels(pixels)]
        crops = [views.of_pixels(pixels, index, epoch) for epoch in range(epochs)]
    else:
        images = [source.open_or_replace(int(i)) for i in index]
        columns = [plain.of_files(images)]
        crops = [views.of_files(images, index, epoch) for epoch in range(epochs)]
    for epoch, cropped in enumerate(crops):
        columns += views.finish(cropped, index, epoch)
    return columns


def _grid(columns: list[Tensor], gap: int = 4) -> Image.Image:
    """Columns of (rows, C, S, S) in [0, 1], each with its own S, as one picture; small images are enlarged alike."""
    largest = max(column.shape[-1] for column in columns)
    zoom = max(1, 96 // largest)
    cell = largest * zoom + gap
    width = sum(column.shape[-1] * zoom + gap for column in columns) + gap
    picture, left = Image.new("RGB", (width, cell * len(columns[0]) + gap), "white"), gap
    for column in columns:
        side = column.shape[-1] * zoom
        for row, image in enumerate(column):
            small = tile(image).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(small, (left, gap + row * cell))
        left += side + gap
    return picture


def tile(image: Tensor) -> Image.Image:
    """An image (C, H, W) in [0, 1] as Pillow's: RGB as it is; the mean of any other channels in grayscale."""
    values = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def views_picture(
    source: IndexedDataset, config: ViewsConfig, seed: int, rows: int = 6, epochs: int = 2
) -> Image.Image:
    """The picture that :func:`draw` saves, of fewer images and epochs."""
    return _grid(columns_of(source, config, seed, rows, epochs))


def main() -> None:
    """The command line."""
    run_command("plot_views", PictureConfig, draw_and_tell)


def draw_and_tell(config: PictureConfig) -> None:
    """Draws random views of a few images."""
    sys.stdout.write(f"wrote {draw(config)}\n")
