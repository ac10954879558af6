"""Features in the plane: what the map shows, in one or two ways."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PERPLEXITY = 30
_STEPS = 500  # half of scikit-learn's own: a thousand images have settled by then, at half the time
_TINY = torch.finfo(torch.float64).tiny


def projections(features: Tensor) -> list[dict[str, Any]]:
    """The map's layouts.

    Args:
        features: shape (N, D); N at least 3, D at least 2.

    Returns:
        Principal components always, t-SNE where scikit-learn is installed: each with a ``name``, its ``points`` in the unit
        square, and a sentence that says how to read it.
    """
    plane, variance = pca_projection(features)
    share = 100 * float(variance.sum())
    found = [
        _layout(
            "PCA",
            plane,
            f"Two principal components: distances mean something, and {share:.0f} % of the variance is here.",
        )
    ]
    by_neighbors = tsne_projection(features)
    if by_neighbors is not None:
        found.append(
            _layout(
                "t-SNE", by_neighbors, "t-SNE keeps neighbors together: groups mean something, their distances don't."
            )
        )
    return found


def pca_projection(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of L2-normalized features.

    Returns:
        Coordinates of shape (N, 2), and the two components' shares of the variance, shape (2,).
    """
    unit = F.normalize(features.double(), dim=1)
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    variance = s.square() / s.square().sum().clamp_min(_TINY)
    return u[:, :2] * s[:2], variance[:2]


def tsne_projection(features: Tensor) -> Tensor | None:
    """The t-SNE of L2-normalized features (van der Maaten and Hinton 2008), started from the principal components.

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
    if not unit.std(0).any():  # collapsed onto one point: there is nothing to start from
        return None
    fitted = TSNE(init="pca", perplexity=_PERPLEXITY, max_iter=_STEPS, random_state=0).fit_transform(unit)
    return torch.from_numpy(fitted).double()


def _layout(name: str, plane: Tensor, text: str) -> dict[str, Any]:
    low, high = plane.min(0).values, plane.max(0).values
    scaled = (plane - low) / (high - low).clamp_min(_TINY)
    return {"name": name, "points": [[round(x, 4), round(y, 4)] for x, y in scaled.tolist()], "help": text}
