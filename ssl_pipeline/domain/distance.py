"""How far apart two domains are for a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.metrics.linear_probe import fit_linear
from ssl_pipeline.rng import permutation

_MOST = 1000
_DECAY = 1e-3


def proxy_a_distance(first: Tensor, second: Tensor) -> float:
    r"""The proxy A-distance (Ben-David et al. 2007): how well a linear classifier tells the domains.

    .. math:: 2 (1 - 2 \varepsilon), \qquad \varepsilon \text{ the error on the half that it was not fitted on}

    Each half is fitted once and the two errors are averaged; as many rows of both domains count, up to 1,000.

    Args:
        first: features of shape (N, D), N at least 2.
        second: of shape (M, D), M at least 2.

    Returns:
        0 where the domains can't be told apart (a worse guess than chance is chance), 2 where they always can.
    """
    count = min(len(first), len(second), _MOST)
    # Drawn, because rows may be in the order of their classes; of two equally long sets the same rows are in a half.
    sides = [side[permutation(len(side), "proxy A-distance")[:count]] for side in (first, second)]
    halves = [[side[part::2] for side in sides] for part in (0, 1)]
    errors = [_error(fitted, told) for fitted, told in (halves, halves[::-1])]
    return max(0.0, 2 * (1 - sum(errors)))


def _error(fitted: list[Tensor], told: list[Tensor]) -> float:
    rows, labels = torch.cat(fitted), torch.cat([torch.full((len(s),), n) for n, s in enumerate(fitted)])
    weight, bias = fit_linear(rows, labels, 2, _DECAY)
    wrong = [(side @ weight.T + bias).argmax(1) != number for number, side in enumerate(told)]
    return float(torch.cat(wrong).double().mean())
