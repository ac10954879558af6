"""Pictures of an evaluation: neighbors, a map of the features, a confusion matrix. Drawn by Pillow, in a tenth of a second.

And what such pictures are drawn from: two-dimensional projections, and the images nearest to others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import as_8_bit
from ssl_pipeline.evaluation.features import one_of_each_class
from ssl_pipeline.evaluation.plot_views import views_picture
from ssl_pipeline.logging.logger import LoggerCollection
from ssl_pipeline.metrics.knn import nearest_neighbors
from ssl_pipeline.transforms.config import ViewsConfig

_log = logging.getLogger("ssl_pipeline")
_MOST_OF_THE_TIME = 0.005
_MAP, _THUMBNAIL, _TILE, _EDGE = 800, 28, 64, 3
_QUERIES, _NEIGHBORS = 8, 7
_OTHER_CLASS, _SAME_CLASS, _NO_CLASS = "#d55e00", "#009e73", "#999999"  # the color-blind see the difference, too
_CLASSES = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#444444", "#8c564b", "#b3b3b3",
)  # fmt: skip
_PERPLEXITY = 30
_STEPS = 500  # half of scikit-learn's own: a thousand images have settled by then
_TINY = torch.finfo(torch.float64).tiny


class ImageLogger:
    """Draws into a run's ``media/``: at the start and the end, and at evaluations as long as that costs next to nothing.

    A picture that can't be drawn ends the drawing with one warning, and the run goes on.
    """

    def __init__(self, trackers: LoggerCollection, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trackers, self._clock, self._draws = trackers, clock, trackers.draws
        self._began, self._spent = clock(), 0.0

    def views(self, step: int, source: IndexedDataset, config: ViewsConfig, seed: int) -> None:
        self._draw(step, {"views": partial(views_picture, source, config, seed)})

    def evaluation(self, step: int, seen: tuple[IndexedDataset, Tensor, Tensor] | None, must: bool) -> None:
        """Neighbors and map of the images ``seen`` by the last evaluation: a source, their numbers in it, and their features.

        They ``must`` be drawn whatever was spent before, or are only while pictures took less than 0.5 % of the time.
        """
        affordable = self._spent <= _MOST_OF_THE_TIME * (self._clock() - self._began)
        if seen is not None and (must or affordable):
            makers = {"neighbors": neighbor_strips, "embedding_map": embedding_map}
            self._draw(step, {name: partial(make, *seen) for name, make in makers.items()})

    def confusion(self, step: int, matrix: Tensor, classes: tuple[str, ...]) -> None:
        self._draw(step, {"confusion": partial(confusion_picture, matrix, classes)})

    def _draw(self, step: int, makers: Mapping[str, Callable[[], Image.Image]]) -> None:
        if not self._draws:
            return
        began = self._clock()
        try:
            self._trackers.log_images(step, {name: make() for name, make in makers.items()})
        except Exception as error:  # a run is worth more than a picture of it
            self._draws = False
            _log.warning("no more pictures are drawn: %s failed (%s)", " or ".join(makers), error)
        self._spent += self._clock() - began


def neighbor_strips(source: IndexedDataset, index: Tensor, features: Tensor) -> Image.Image:
    """Rows of an image and those nearest to it by cosine; a frame is green where the class is the same, red where not."""
    count = min(_NEIGHBORS, len(index) - 1)
    queries = one_of_each_class(source, index)[:_QUERIES]
    found = nearest_images(features[queries], features, count, queries)
    cell, gap = _TILE + 2 * _EDGE + 2, 8
    picture = Image.new("RGB", (cell * (count + 1) + gap, cell * len(queries)), "white")
    for row, query in enumerate(queries):
        wanted = _label(source, index, query)
        picture.paste(_framed(source, int(index[query]), _TILE, _NO_CLASS), (0, row * cell))
        for column, (place, _) in enumerate(found[row]):
            label = _label(source, index, place)
            color = _NO_CLASS if label is None else _SAME_CLASS if label == wanted else _OTHER_CLASS
            tile = _framed(source, int(index[place]), _TILE, color)
            picture.paste(tile, (gap + (column + 1) * cell, row * cell))
    return picture


def embedding_map(source: IndexedDataset, index: Tensor, features: Tensor) -> Image.Image:
    """The images at their features' first two principal components; the color of a frame is the class."""
    room = _MAP - _THUMBNAIL - 2 * _EDGE
    spots = (to_unit_square(pca_projection(features)[0]) * room).round().long().tolist()
    picture = Image.new("RGB", (_MAP, _MAP), "white")
    for place, (x, y) in enumerate(spots):
        label = _label(source, index, place)
        color = _NO_CLASS if label is None else _CLASSES[label % len(_CLASSES)]
        picture.paste(_framed(source, int(index[place]), _THUMBNAIL, color), (x, room - y))
    return picture


def confusion_picture(matrix: Tensor, classes: tuple[str, ...]) -> Image.Image:
    """A confusion matrix, int64 of shape (true, predicted): the darker a cell, the greater its share of the true class."""
    cell = max(4, min(48, 960 // len(classes)))
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top = 8 + max(int(ruler.textlength(name)) for name in classes), 20
    picture = Image.new("RGB", (max(360, left + cell * len(classes)), cell * len(classes) + top), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 4), f"rows: true class, columns: predicted class, same order; {int(matrix.sum())} images", "black")
    shares = (matrix / matrix.sum(1, keepdim=True).clamp_min(1)).tolist()
    for row, name in enumerate(classes):
        y = top + row * cell
        if cell >= 12:
            draw.text((4, y + cell // 2 - 6), name, "black")
        for column, share in enumerate(shares[row]):
            x = left + column * cell
            shade = tuple(round(255 - share * (255 - full)) for full in (0, 114, 178))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade)
            if cell >= 32 and share > 0:
                draw.text(
                    (x + 4, y + cell // 2 - 7), str(int(matrix[row, column])), "white" if share > 0.5 else "black"
                )
    return picture


def _framed(source: IndexedDataset, sample: int, size: int, color: str) -> Image.Image:
    tile = Image.new("RGB", (size + 2 * _EDGE, size + 2 * _EDGE), color)
    image = as_8_bit(source.open_or_replace(sample), "RGB").resize((size, size), Image.Resampling.BILINEAR)
    tile.paste(image, (_EDGE, _EDGE))
    return tile


def _label(source: IndexedDataset, index: Tensor, place: int) -> int | None:
    label = -1 if source.labels is None else int(source.labels[index[place]])
    return None if label < 0 else label


def pca_projection(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of L2-normalized features.

    Returns:
        Coordinates of shape (N, 2), and the components' shares of the variance, shape (2,).
    """
    unit = F.normalize(features.double(), dim=1)
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    variance = s.square() / s.square().sum().clamp_min(_TINY)
    return F.pad(u * s, (0, 2))[:, :2], F.pad(variance, (0, 2))[:2]


def tsne_projection(features: Tensor) -> Tensor | None:
    """The t-SNE of L2-normalized features (van der Maaten and Hinton 2008), initialized by PCA.

    Returns:
        Coordinates of shape (N, 2), the same at every call; None without scikit-learn, or for too few images.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    if len(features) <= 3 * _PERPLEXITY:
        return None
    unit = F.normalize(features.float(), dim=1).numpy()
    if not unit.std(0).any():  # all features are equal: PCA has nothing to start from
        return None
    fitted = TSNE(init="pca", perplexity=_PERPLEXITY, max_iter=_STEPS, random_state=0).fit_transform(unit)
    return torch.from_numpy(fitted).double()


def to_unit_square(plane: Tensor) -> Tensor:
    """Coordinates (N, 2) scaled so that each axis runs from 0 to 1."""
    low, high = plane.min(0).values, plane.max(0).values
    return (plane - low) / (high - low).clamp_min(1e-12)


def nearest_images(
    queries: Tensor, features: Tensor, count: int, own: Sequence[int | None]
) -> list[list[tuple[int, float]]]:
    """The images (N, D) nearest to each query (Q, D) by cosine: their places and cosines, most similar first.

    ``own`` are the queries' places among the images, left out of their neighbors; None for an image of another source.
    """
    similarity, place = next(nearest_neighbors(queries, features, min(count + 1, len(features))))
    found = [list(zip(p, s, strict=True)) for p, s in zip(place.tolist(), similarity.tolist(), strict=True)]
    return [[near for near in row if near[0] != self][:count] for row, self in zip(found, own, strict=True)]
