"""``ssl-pipeline neighbors ENCODER IMAGE data=…``: the images nearest to one by an encoder's features, as a list and a picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from pydantic import Field

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import check_folder_of, run_command
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import as_8_bit, decode
from ssl_pipeline.data.splits import Split
from ssl_pipeline.evaluation.features import class_name, extract
from ssl_pipeline.evaluation.load_encoder import EncoderConfig, describe_encoder, open_encoder
from ssl_pipeline.evaluation.plots import nearest_images
from ssl_pipeline.export.embed import open_sources
from ssl_pipeline.logging.progress import console

_ENDINGS = (".png", ".jpg", ".pdf", ".svg")
_COLUMNS = 10


class NeighborsConfig(EncoderConfig):
    """Of which image, among which.

    Attributes:
        image: an image file, or the number of an image of the split, which is then left out of its own neighbors.
        split: the images that are searched.
        k: how many neighbors.
        output: the picture.
    """

    image: str | int | None = None
    split: Split = "train"
    k: int = Field(8, ge=1)
    output: str = "neighbors.png"


@dataclass(frozen=True)
class Neighbor:
    """An image that was found: its number in the split, its path, its class where known, and the cosine of the features."""

    index: int
    name: str
    label: str | None
    similarity: float


def find(config: NeighborsConfig, source: IndexedDataset) -> tuple[Image.Image, list[Neighbor]]:
    """The query as it was decoded, and its neighbors, most similar first.

    Raises:
        ConfigError: more neighbors than there are images, or no such image.
        DecodeError: the query is no image.
    """
    if config.image is None:
        raise ConfigError(
            "`image` is required: neighbors ENCODER IMAGE, a file or the number of an image of the split."
        )
    opened = open_encoder(config, source)
    number = _number(str(config.image), source)
    bank = len(source) - (number is not None)
    if config.k > bank:
        raise ConfigError(f"`k` is {config.k}, and there are only {bank} images to find: lower it.")
    features = extract(opened.encoder, source, opened.preprocessing, opened.share)
    if number is not None:
        query = source.open_image(number)
        row = features[number : number + 1]
    else:
        query = decode(Path(str(config.image)).expanduser(), source.channels, value_range=source.value_range)
        with torch.no_grad():
            images = opened.preprocessing.of_files([query]).to(opened.share.device)
            row = opened.encoder.features(images).float().cpu()
    (found,) = nearest_images(row, features, config.k, [number])
    return query, [Neighbor(i, source.describe(i), class_name(source, i), value) for i, value in found]


def _number(text: str, source: IndexedDataset) -> int | None:
    """The query's number in the source; None where it is a file."""
    if not text.isdecimal() or Path(text).exists():
        return None
    if int(text) >= len(source):
        raise ConfigError(
            f"`image`: {source.name} has {len(source)} images, numbered from 0, and none has number {text}."
        )
    return int(text)


def draw(query: Image.Image, found: list[Neighbor], source: IndexedDataset, path: Path) -> None:
    """Saves the strip: the query first, then its neighbors with their similarity and class."""
    from matplotlib.figure import Figure

    tiles = [(query, "query")]
    for neighbor in found:
        label = f"\n{neighbor.label}" if neighbor.label is not None else ""
        tiles.append((source.open_image(neighbor.index), f"{neighbor.similarity:.3f}{label}"))
    columns = min(len(tiles), _COLUMNS)
    rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows), layout="constrained")
    for place, (image, title) in enumerate(tiles, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.axis("off")
        axes.imshow(as_8_bit(image, "RGB"), interpolation="nearest")
        axes.set_title(title, fontsize=9, fontweight="bold" if place == 1 else "normal", parse_math=False)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def find_and_tell(config: NeighborsConfig) -> None:
    """Finds the images of a data set that are nearest to one by an encoder's features."""
    path = Path(config.output).expanduser()
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(f"`output`: {str(path)!r} is no picture's name: end it in {', '.join(_ENDINGS)}.")
    check_folder_of(path, "`output`")
    source = open_sources(config, config.split)[config.split]
    query, found = find(config, source)
    for neighbor in found:
        label = f"  {neighbor.label}" if neighbor.label is not None else ""
        console().print(f"{neighbor.similarity:.4f}  {neighbor.name}{label}", markup=False)
    draw(query, found, source, path)
    console().print(f"wrote {path}", markup=False)


def main() -> None:
    """The command line."""
    run_command("neighbors", NeighborsConfig, find_and_tell, describe_encoder(sys.argv[1:], ["encoder", "image"]))


if __name__ == "__main__":
    main()
