"""Which classes are taken for which."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(told: Tensor, true: Tensor, classes: int) -> Tensor:
    """Counts of each pair of a true and a told class.

    Args:
        told: int64 of shape (N,).
        true: likewise; −1 where it is not known, which counts for nothing.
        classes: number of classes.

    Returns:
        int64 of shape (classes, classes): rows are true classes, columns told ones.
    """
    known = true >= 0
    pairs = true[known] * classes + told[known]
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
