"""What the page shows of a run's images: its views, neighbors, a map of the features, and how their spread decays.

All of it is made when the page is made, from the run's own config and its encoder: training pays nothing for it, the run's
folder stays small, and runs from before the report have it too. The test images are never read.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import UserError, first_line
from ssl_pipeline.config.schema import resolve
from ssl_pipeline.data.loader import DistInfo, Preprocessing, open_or_replace
from ssl_pipeline.data.source import IndexedDataset
from ssl_pipeline.data.stream import open_training, preview
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.evaluation.plot_views import columns_of, tile
from ssl_pipeline.metrics.classes import class_name, one_of_each_class
from ssl_pipeline.metrics.knn import nearest_neighbors
from ssl_pipeline.models.artifact import load_encoder
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.report.planes import projections
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.rng import permutation

_MOST_IMAGES = 1000  # on the map: the page holds a thumbnail of each
_QUERIES, _NEIGHBORS = 8, 7
_VIEW_ROWS, _VIEW_EPOCHS = 6, 3
_PIXELS = 96  # of a picture's longer side
_SPRITE_PIXELS, _SPRITE_COLUMNS = 48, 32
_WHAT_CAN_FAIL = (
    UserError,
    OSError,
    ImportError,
    ValueError,
    RuntimeError,
)  # gone data, other versions, a damaged file


@dataclass(frozen=True)
class RunImages:
    """What there is to see of one run; what can't be shown is None, and ``notes`` say why.

    Attributes:
        views: the views grid.
        neighbors: queries with their nearest images.
        map: the features in the plane.
        spectrum: the spread of the features by direction and by dimension.
        notes: sentences for the page.
    """

    views: dict[str, Any] | None = None
    neighbors: list[dict[str, Any]] | None = None
    map: dict[str, Any] | None = None
    spectrum: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def run_images(run: RunRecord) -> RunImages:
    """Looks at a stage-one run; other stages have nothing of their own to see."""
    if run.stage != "pretrain":
        return RunImages()
    try:
        config = resolve(PretrainConfig, run.config)
    except UserError as error:
        return RunImages(
            notes=(f"Its images can't be shown: this version does not understand its config.yaml ({_line(error)}).",)
        )
    try:
        train = preview(open_training(config.data))
        dev = config.data.open("dev")
        views = _views(train, config)
    except _WHAT_CAN_FAIL as error:
        return RunImages(notes=(f"Its images can't be shown: the data can't be reached ({_line(error)}).",))
    if not (run.folder / "encoder.safetensors").is_file():
        return RunImages(views, notes=("Neighbors, map and spectrum appear once the run has written its encoder.",))
    try:
        return _of_features(run.folder, dev if dev is not None else train, views)
    except _WHAT_CAN_FAIL as error:
        return RunImages(views, notes=(f"Neighbors, map and spectrum can't be shown ({_line(error)}).",))


def _line(error: BaseException) -> str:
    return first_line(error).rstrip(".")


def _views(train: IndexedDataset, config: PretrainConfig) -> dict[str, Any]:
    """Rows of images; in each row a group of the image itself, then one of an epoch's views for each epoch."""
    columns = columns_of(train, config.views, config.seed, _VIEW_ROWS, _VIEW_EPOCHS)
    total = config.views.total
    uris = [[picture_uri(tile(image)) for image in images] for images in zip(*columns, strict=True)]
    starts = [1 + epoch * total for epoch in range(_VIEW_EPOCHS)]
    return {
        "groups": [{"name": "image", "count": 1}]
        + [{"name": f"epoch {epoch + 1}", "count": total} for epoch in range(_VIEW_EPOCHS)],
        "rows": [[row[:1], *(row[start : start + total] for start in starts)] for row in uris],
    }


def _of_features(folder: Path, source: IndexedDataset, views: dict[str, Any]) -> RunImages:
    encoder, card = load_encoder(folder)
    share = DistInfo(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    blueprint = card.blueprint
    index = permutation(len(source), "report", "images")[:_MOST_IMAGES].sort().values
    preprocessing = Preprocessing.of(blueprint)
    features = extract(encoder.to(share.device), source, preprocessing, share, index)
    return RunImages(
        views, neighbor_strips(features, source, index), map_of(features, source, index), spectrum(features)
    )


def spectrum(features: Tensor) -> dict[str, Any]:
    """How the spread of L2-normalized features is shared out.

    Args:
        features: shape (N, D), N at least 2.

    Returns:
        ``share``: each principal direction's share of the variance, the greatest first. ``std``: each dimension's standard
        deviation times √D, the greatest first; 1 is spread evenly over the sphere.
    """
    unit = F.normalize(features.double(), dim=1)
    variance = torch.linalg.svdvals(unit - unit.mean(0)).square()
    share = variance / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    std = unit.std(0, correction=0).sort(descending=True).values * unit.shape[1] ** 0.5
    return {"share": _short(share), "std": _short(std), "width": features.shape[1], "images": len(features)}


def map_of(features: Tensor, source: IndexedDataset, index: Tensor) -> dict[str, Any] | None:
    """The features in the plane, with a thumbnail of each image; None for fewer than three images."""
    if len(features) < 3 or features.shape[1] < 2:
        return None
    thumbnails, size = _sprite(source, index)
    labels = None if source.labels is None or source.classes is None else source.labels[index].tolist()
    return {
        "layouts": projections(features), "labels": labels, "classes": list(source.classes or ()), "source": source.name,
        "names": [f"image {i}" for i in index.tolist()], "sprite": thumbnails, "columns": _SPRITE_COLUMNS, "size": size,
    }  # fmt: skip


def neighbor_strips(features: Tensor, source: IndexedDataset, index: Tensor) -> list[dict[str, Any]]:
    """A few images, one of each class as long as there are classes, with the images nearest to each by cosine."""
    count = min(_NEIGHBORS, len(features) - 1)
    queries = one_of_each_class(source, index)[:_QUERIES]
    strips = []
    similarity, place = next(nearest_neighbors(features[queries], features, count + 1))
    for row, query in enumerate(queries):
        near = [(int(p), float(s)) for p, s in zip(place[row], similarity[row], strict=True) if int(p) != query][:count]
        strips.append({
            "query": _shown(source, int(index[query])),
            "near": [{**_shown(source, int(index[p])), "similarity": s,
                      "same": class_name(source, int(index[p])) == class_name(source, int(index[query]))} for p, s in near],
        })  # fmt: skip
    return strips


def _shown(source: IndexedDataset, sample: int) -> dict[str, Any]:
    uri = picture_uri(open_or_replace(source, sample).convert("RGB"))
    return {"picture": uri, "label": class_name(source, sample), "name": f"image {sample}"}


def _sprite(source: IndexedDataset, index: Tensor) -> tuple[str, int]:
    """All thumbnails in one picture, and the side of a cell: one data URI is far smaller than a thousand."""
    size = _SPRITE_PIXELS
    if source.pixels is not None:
        size = min(size, max(source.pixels.shape[2:]))
    rows = -(-len(index) // _SPRITE_COLUMNS)
    sheet = Image.new("RGB", (size * _SPRITE_COLUMNS, size * rows))
    for place, sample in enumerate(index.tolist()):
        small = _fitted(open_or_replace(source, sample).convert("RGB"), size)
        left, top = place % _SPRITE_COLUMNS * size, place // _SPRITE_COLUMNS * size
        sheet.paste(small, (left + (size - small.width) // 2, top + (size - small.height) // 2))
    return _uri(sheet, "JPEG", quality=82), size


def picture_uri(image: Image.Image) -> str:
    """A small picture as a data URI: lossless where it is small anyhow, JPEG for a reduced photo."""
    if max(image.size) <= _PIXELS:
        return _uri(image, "PNG", optimize=True)
    return _uri(_fitted(image.convert("RGB"), _PIXELS), "JPEG", quality=85)


def _fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
