"""How well images of unknown classes are recognized as unknown. A score is larger where an image seems known."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.metrics.classification import auroc, average_precision
from ssl_pipeline.metrics.knn import nearest_neighbors

SCORES = ("msp", "max_logit", "energy", "knn")


def neighbor_score(features: Tensor, bank: Tensor, k: int = 10) -> Tensor:
    """Minus the distance (N,) of unit rows (N, D) to the k-th nearest, or last, of the training images' (M, D) (Sun et al. 2022)."""
    cosines = torch.cat([similarity[:, -1] for similarity, _ in nearest_neighbors(features, bank, k)])
    return -(2 - 2 * cosines).clamp_min(0).sqrt()


def scores(logits: Tensor, features: Tensor, bank: Tensor) -> dict[str, Tensor]:
    """Each score (N,) of images, by their logits (N, K) and features (N, D), and the training images' features (M, D).

    Greatest softmax probability (Hendrycks and Gimpel 2017), greatest logit (Hendrycks et al. 2022), minus the free energy
    (Liu et al. 2020), and :func:`neighbor_score`.
    """
    found = logits.softmax(1).amax(1), logits.amax(1), logits.logsumexp(1), neighbor_score(features, bank)
    return dict(zip(SCORES, found, strict=True))


def aupr_unknown(known: Tensor, unknown: Tensor) -> float:
    """Average precision at finding the unknown images, lowest scores first; scores of shapes (N,) and (M,)."""
    both = torch.cat([unknown, known])
    return average_precision(-both, torch.arange(len(both)) < len(unknown))


def threshold(known: Tensor) -> float:
    """The highest score that at least 95 % of the known images (N,) reach."""
    ordered = known.sort(descending=True).values
    return float(ordered[max(1, -(-len(known) * 95 // 100)) - 1])


def fpr_at_95_known(known: Tensor, unknown: Tensor) -> float:
    """The share of unknown images accepted where at least 95 % of the known ones are."""
    return float((unknown >= threshold(known)).double().mean())


def oscr(known: Tensor, right: Tensor, unknown: Tensor) -> float:
    """The area under the rate of known images accepted and rightly classified, over the rate of unknown ones accepted.

    By trapezoids over all thresholds (Dhamija et al. 2018) of scores (N,) and (M,); never above the accuracy.
    """
    return float(right.double().mean()) * auroc(known[right], unknown) if bool(right.any()) else 0.0


def hos(known_right: Tensor, label: Tensor, unknown_rejected: Tensor) -> float:
    """The harmonic mean of the known classes' mean accuracy and the share of unknown images rejected (Bucci et al. 2020).

    ``known_right`` (N,) are known images, of classes ``label``, that were accepted and rightly classified.
    """
    of_class = torch.stack([known_right[label == c].double().mean() for c in label.unique()])
    accepted, rejected = float(of_class.mean()), float(unknown_rejected.double().mean())
    return 2 * accepted * rejected / (accepted + rejected) if accepted + rejected else 0.0
