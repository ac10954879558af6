"""Losses that are small where two sets of features have one distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def covariance(rows: Tensor) -> Tensor:
    """Of rows (N, D), over N − 1: (D, D)."""
    centered = rows - rows.mean(0)
    return centered.T @ centered / (len(rows) - 1)


def coral_loss(first: Tensor, second: Tensor) -> Tensor:
    r"""The distance of covariances, in the paper's scale (Sun and Saenko 2016, eq. 1).

    .. math:: \frac{1}{4 d^2} \lVert C_1 - C_2 \rVert_F^2

    Args:
        first: shape (N, d), float32.
        second: shape (M, d).
    """
    return (covariance(first) - covariance(second)).square().sum() / (4 * first.shape[1] ** 2)


def moments_loss(first: Tensor, second: Tensor) -> Tensor:
    r"""The distances of means and of covariances, each the mean over its entries (Gulrajani and Lopez-Paz 2021, CORAL).

    .. math:: \frac{1}{d} \lVert \mu_1 - \mu_2 \rVert^2 + \frac{1}{d^2} \lVert C_1 - C_2 \rVert_F^2

    Args:
        first: shape (N, d), float32.
        second: shape (M, d).
    """
    means = (first.mean(0) - second.mean(0)).square().mean()
    return means + (covariance(first) - covariance(second)).square().mean()


def mmd_loss(first: Tensor, second: Tensor, bandwidths: Sequence[float]) -> Tensor:
    r"""The squared maximum mean discrepancy, its biased estimate, which is never below 0 (Gretton et al. 2012, eq. 5).

    .. math:: \overline{k(x, x')} + \overline{k(y, y')} - 2\, \overline{k(x, y)}, \qquad
        k(a, b) = \frac{1}{|S|} \sum_{s \in S} e^{-\lVert a - b \rVert^2 / (s\, \bar{d})}

    Args:
        first: shape (N, d), float32.
        second: shape (M, d).
        bandwidths: S; :math:`\bar d` is the mean squared distance of two different rows, without a gradient.
    """
    rows = torch.cat([first, second])
    squared = rows.square().sum(1)
    distance = (squared[:, None] + squared[None, :] - 2 * rows @ rows.T).clamp_min(0)
    scale = (distance.detach().sum() / (len(rows) * (len(rows) - 1))).clamp_min(torch.finfo(rows.dtype).tiny)
    kernel = torch.stack([torch.exp(-distance / (bandwidth * scale)) for bandwidth in bandwidths]).mean(0)
    n = len(first)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
