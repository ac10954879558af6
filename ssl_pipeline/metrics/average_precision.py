"""Average precision: how far up a ranking what is looked for stands."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, wanted: Tensor) -> float:
    r"""Of a ranking by scores, greatest first; equal scores count as one step, as in scikit-learn.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    over the thresholds :math:`n`, with precision :math:`P_n` and recall :math:`R_n`. Only the order of the scores counts.

    Args:
        scores: shape (N,).
        wanted: what is looked for, bool of shape (N,), true at least once.
    """
    order = scores.argsort(descending=True)
    last_of_equals = torch.cat([scores[order].diff() != 0, torch.ones(1, dtype=torch.bool, device=scores.device)])
    found = wanted[order].double().cumsum(0)[last_of_equals]
    precision = found / (last_of_equals.nonzero()[:, 0] + 1)
    recall = found / found[-1]
    return float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())
