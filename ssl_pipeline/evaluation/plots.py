"""What pictures of features are drawn from: two-dimensional projections, and the images nearest to others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.metrics.knn import nearest_neighbors

_PERPLEXITY = 30
_STEPS = 500  # half of scikit-learn's own: a thousand images have settled by then
_TINY = torch.finfo(torch.float64).tiny


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
    """The images nearest to each query by cosine.

    Args:
        queries: shape (Q, D).
        features: of the images that are searched, shape (N, D).
        count: how many for each query.
        own: each query's place among the images, which is left out of its neighbors; None for an image of another source.

    Returns:
        Per query the places and cosines, most similar first.
    """
    similarity, place = next(nearest_neighbors(queries, features, min(count + 1, len(features))))
    found = [list(zip(p, s, strict=True)) for p, s in zip(place.tolist(), similarity.tolist(), strict=True)]
    return [[near for near in row if near[0] != self][:count] for row, self in zip(found, own, strict=True)]
