"""What the page shows of a run's images: views, neighbors, a map of the features, and their spectrum.

All of it is made when the page is made, from the run's own config and its encoder: training pays nothing for it, the run's
folder stays small, and runs from before the report have it too. The test images are never read.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import UserError, first_line
from ssl_pipeline.config.schema import resolve
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.source import open_training
from ssl_pipeline.evaluation.features import class_name, extract, one_of_each_class
from ssl_pipeline.evaluation.plot_views import columns_of, tile
from ssl_pipeline.evaluation.plots import nearest_images, pca_projection, tsne_projection
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.svg import draw_map
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.preprocessing import Preprocessing

_MOST_IMAGES = 1000  # on the map
_QUERIES, _NEIGHBORS = 8, 7
_VIEW_ROWS, _VIEW_EPOCHS = 6, 3
_PIXELS, _THUMBNAIL = 96, 48  # the longer side of a picture, and of a thumbnail on the map
# Data that has moved, other versions of libraries, a damaged file.
_CAN_FAIL = (UserError, OSError, ImportError, ValueError, RuntimeError)


@dataclass(frozen=True)
class RunImages:
    """What there is to see of one run; what can't be shown is None, and ``notes`` say why."""

    views: dict[str, Any] | None = None
    neighbors: list[dict[str, Any]] | None = None
    map: dict[str, Any] | None = None
    spectrum: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def run_images(run: RunRecord) -> RunImages:
    """The images of a stage-one run; other stages have none of their own."""
    if run.stage != "pretrain":
        return RunImages()
    views, problem = None, "Its images can't be shown: this version does not understand its config.yaml"
    try:
        config = resolve(PretrainConfig, run.config)
        problem = "Its images can't be shown: the data can't be reached"
        train, val = open_training(config.data).preview(), config.data.open("val")
        views = _views(train, config)
        if not (run.folder / "encoder.safetensors").is_file():
            return RunImages(views, notes=("Neighbors, map and spectrum appear once the run has written its encoder.",))
        problem = "Neighbors, map and spectrum can't be shown"
        source = val if val is not None else train
        encoder, card = load_encoder(run.folder)
        share = DistInfo(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        index = permutation(len(source), "report", "images")[:_MOST_IMAGES].sort().values
        features = extract(encoder.to(share.device), source, Preprocessing.of(card.blueprint), share, index)
        strips, plane = neighbor_strips(features, source, index), map_of(features, source, index, run.name)
        return RunImages(views, strips, plane, spectrum(features))
    except _CAN_FAIL as error:
        return RunImages(views, notes=(f"{problem} ({first_line(error).rstrip('.')}).",))


def _views(train: IndexedDataset, config: PretrainConfig) -> dict[str, Any]:
    """Rows of images; in each row a group of the image itself, then one of an epoch's views for each epoch."""
    columns = columns_of(train, config.transform, config.seed, _VIEW_ROWS, _VIEW_EPOCHS)
    total = config.transform.total
    uris = [[data_uri(tile(image)) for image in images] for images in zip(*columns, strict=True)]
    epochs = [{"name": f"epoch {epoch + 1}", "count": total} for epoch in range(_VIEW_EPOCHS)]
    starts = range(1, 1 + _VIEW_EPOCHS * total, total)
    return {
        "groups": [{"name": "image", "count": 1}, *epochs],
        "rows": [[row[:1], *(row[start : start + total] for start in starts)] for row in uris],
    }


def spectrum(features: Tensor) -> dict[str, Any]:
    """The spread of L2-normalized features of shape (N, D), N at least 2.

    Returns:
        ``share``: each principal direction's share of the variance, the greatest first. ``std``: each dimension's standard
        deviation times √D, the greatest first; 1 is spread evenly over the sphere.
    """
    unit = F.normalize(features.double(), dim=1)
    variance = torch.linalg.svdvals(unit - unit.mean(0)).square()
    share = variance / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    std = unit.std(0, correction=0).sort(descending=True).values * unit.shape[1] ** 0.5
    return {"share": share.tolist(), "std": std.tolist()}


def map_of(features: Tensor, source: IndexedDataset, index: Tensor, key: str) -> dict[str, Any] | None:
    """The features in the plane, by PCA and t-SNE, with thumbnails; None for fewer than three images."""
    if len(features) < 3 or features.shape[1] < 2:
        return None
    labels = None if source.labels is None or source.classes is None else source.labels[index].tolist()
    thumbnails = [_fitted(source.open_or_replace(i).convert("RGB"), _THUMBNAIL) for i in index.tolist()]
    plane, variance = pca_projection(features)
    share = 100 * float(variance.sum())
    layouts: dict[str, tuple[Tensor | None, str]] = {
        "PCA": (plane, f"Two principal components: distances mean something, and {share:.0f} % of the variance is here."),
        "t-SNE": (tsne_projection(features), "t-SNE keeps neighbors together: groups mean something, their distances don't."),
    }  # fmt: skip
    what = f"{len(index)} images of {source.name}"
    return {
        "layouts": [
            {"name": name, "help": f"{what}. {text}",
             "svg": draw_map(f"{key} {name}", places, labels, thumbnails, f"Map of {what} by {name}")}
            for name, (places, text) in layouts.items() if places is not None
        ],
        "labels": labels, "classes": list(source.classes or ()), "images": index.tolist(),
    }  # fmt: skip


def neighbor_strips(features: Tensor, source: IndexedDataset, index: Tensor) -> list[dict[str, Any]]:
    """A few images, one of each class as long as there are classes, with the images nearest to each by cosine."""
    queries = one_of_each_class(source, index)[:_QUERIES]
    strips = []
    for query, near in zip(queries, nearest_images(features[queries], features, _NEIGHBORS, queries), strict=True):
        shown, of_query = list[dict[str, Any]](), _shown(source, int(index[query]))
        for place, cosine in near:
            one = _shown(source, int(index[place]))
            shown.append({**one, "similarity": cosine, "same": one["label"] == of_query["label"]})
        strips.append({"query": of_query, "near": shown})
    return strips


def _shown(source: IndexedDataset, sample: int) -> dict[str, Any]:
    uri = data_uri(source.open_or_replace(sample).convert("RGB"))
    return {"picture": uri, "label": class_name(source, sample), "name": f"image {sample}"}


def data_uri(image: Image.Image) -> str:
    """A small picture as a data URI: lossless where it is small anyhow, JPEG for a reduced photo."""
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= _PIXELS else "jpeg"
    if kind == "png":
        image.save(buffer, kind, optimize=True)
    else:
        _fitted(image.convert("RGB"), _PIXELS).save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    return image if scale >= 1 else image.resize([max(1, round(side * scale)) for side in image.size])
