"""Losses of the methods across domains: certainty of predictions, and distances of two sets of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax of each row: (N, K) to (N,).

    By log-softmax: the gradient of ``special.entr`` is NaN where a probability underflows.
    """
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def information_maximization(logits: Tensor) -> Tensor:
    r"""Each row certain, all rows together diverse (Liang et al. 2020, eq. 3); lowest at −log K.

    .. math:: \overline{H(p_i)} - H(\overline{p_i})
    """
    mean = logits.softmax(1).mean(0).clamp_min(torch.finfo(logits.dtype).tiny)
    return entropy(logits).mean() + (mean * mean.log()).sum()


def class_confusion(logits: Tensor, temperature: float) -> Tensor:
    """How often a pair of classes is confused; certain rows count for more (Jin et al. 2020). Logits are float32 (N, K)."""
    logits = logits / temperature
    probabilities = logits.softmax(1)
    weight = 1 + torch.exp(-entropy(logits).detach())
    weight = len(logits) * weight / weight.sum()
    correlation = probabilities.T @ (probabilities * weight[:, None])
    correlation = correlation / correlation.sum(1, keepdim=True)
    return (correlation.sum() - correlation.trace()) / logits.shape[1]


def covariance(rows: Tensor) -> Tensor:
    """Of rows (N, D), over N − 1: (D, D)."""
    centered = rows - rows.mean(0)
    return centered.T @ centered / (len(rows) - 1)


def coral_loss(first: Tensor, second: Tensor) -> Tensor:
    r"""The distance of covariances of float32 rows (N, d) and (M, d), in the paper's scale (Sun and Saenko 2016, eq. 1).

    .. math:: \frac{1}{4 d^2} \lVert C_1 - C_2 \rVert_F^2
    """
    return (covariance(first) - covariance(second)).square().sum() / (4 * first.shape[1] ** 2)


def moments_loss(first: Tensor, second: Tensor) -> Tensor:
    r"""The distances of means and of covariances, each the mean over its entries (Gulrajani and Lopez-Paz 2021, CORAL).

    .. math:: \frac{1}{d} \lVert \mu_1 - \mu_2 \rVert^2 + \frac{1}{d^2} \lVert C_1 - C_2 \rVert_F^2
    """
    means = (first.mean(0) - second.mean(0)).square().mean()
    return means + (covariance(first) - covariance(second)).square().mean()


def mmd_loss(first: Tensor, second: Tensor, bandwidths: Sequence[float]) -> Tensor:
    r"""The squared maximum mean discrepancy, its biased estimate, which is never below 0 (Gretton et al. 2012, eq. 5).

    .. math:: \overline{k(x, x')} + \overline{k(y, y')} - 2\, \overline{k(x, y)}, \qquad
        k(a, b) = \frac{1}{|S|} \sum_{s \in S} e^{-\lVert a - b \rVert^2 / (s\, \bar{d})}

    Rows are float32 (N, d) and (M, d), S are the bandwidths, and :math:`\bar d` the mean squared distance of two different rows,
    without a gradient.
    """
    rows = torch.cat([first, second])
    squared = rows.square().sum(1)
    distance = (squared[:, None] + squared[None, :] - 2 * rows @ rows.T).clamp_min(0)
    scale = (distance.detach().sum() / (len(rows) * (len(rows) - 1))).clamp_min(torch.finfo(rows.dtype).tiny)
    kernel = torch.stack([torch.exp(-distance / (bandwidth * scale)) for bandwidth in bandwidths]).mean(0)
    n = len(first)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
