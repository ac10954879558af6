"""Has the representation collapsed? Figures that need no label, and a sentence when they say so."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_std(features: Tensor) -> float:
    """The mean over dimensions of the standard deviation of L2-normalized features, times √D (Chen and He 2021).

    1 for features spread evenly over the sphere, 0 for features that are all alike, NaN of fewer than two rows.
    """
    if len(features) < 2:
        return math.nan
    normal = F.normalize(features.float(), dim=1)
    return float(normal.std(0, correction=0).mean() * features.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli 2007), of centered features.

    Between 1 (one direction carries all) and min(N - 1, D); NaN of fewer than two rows or of values that are not finite.
    """
    if len(features) < 2 or not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    total = values.sum()
    if total <= 1e-12:
        return 1.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def alignment(first: Tensor, second: Tensor) -> float:
    """The mean squared distance of two views of a sample on the sphere (Wang and Isola 2020); 0 is perfect."""
    return float((F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)).pow(2).sum(1).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """The log of the mean Gaussian potential over pairs (Wang and Isola 2020); lower is more uniform, 0 is collapse.

    NaN of fewer than two rows, which make no pair.
    """
    squared = torch.pdist(F.normalize(features.float(), dim=1)).pow(2)
    return float((-t * squared).exp().mean().log())


def verdict(figures: Mapping[str, float], width: int | None) -> str | None:
    """A sentence if features of a width have collapsed by their ``feature_std`` and ``effective_rank``, None if they are well."""
    std, rank = figures.get("feature_std"), figures.get("effective_rank")
    if std is not None and std < 0.05:
        return (
            f"The features have collapsed: all images look alike to the backbone (feature std {std:.3f}, healthy runs stay "
            "above 0.2). Lower `optim.lr`, lengthen `optim.warmup`, or check that the views differ enough."
        )
    if rank is not None and rank < (2.0 if width is None else min(2.0, width / 4)):
        shown = f"{rank:.1f}" if width is None else f"{rank:.1f} of {width}"
        return (
            f"The features have collapsed onto few directions (effective rank {shown}). Raise the batch size, "
            "lower the temperature, or strengthen the views."
        )
    return None
