"""Metrics of rankings and of predicted classes."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, wanted: Tensor) -> float:
    r"""Of a ranking by scores, greatest first; equal scores count as one step, as in scikit-learn.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    over the thresholds :math:`n` of scores (N,), with precision :math:`P_n` and recall :math:`R_n` of what is wanted (bool, (N,)), in
    fp64. torchmetrics computes in fp32, and of logits it takes the sigmoid, which makes large ones equal.
    """
    order = scores.argsort(descending=True)
    last_of_equals = torch.cat([scores[order].diff() != 0, torch.ones(1, dtype=torch.bool, device=scores.device)])
    found = wanted[order].double().cumsum(0)[last_of_equals]
    precision = found / (last_of_equals.nonzero()[:, 0] + 1)
    recall = found / found[-1]
    return float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive scores higher than a negative, equal ones counting half; scores of shapes (N,) and (M,)."""
    ordered = negative.double().sort().values
    below, upto = (torch.searchsorted(ordered, positive.double(), right=right) for right in (False, True))
    return float(((below + upto).double() / (2 * len(negative))).mean())


def confusion_matrix(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """Counts of true classes (rows) by predicted ones (columns): int64 (classes, classes), from int64 (N,); a negative true one is unknown."""
    known = true >= 0
    pairs = true[known] * classes + predicted[known]
    return pairs.bincount(minlength=classes**2).view(classes, classes)
