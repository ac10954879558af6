"""The open world: images of classes that were never taught. How known ones are told from unknown ones, and how well.

A score is larger where an image looks more like a known class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.metrics.average_precision import average_precision
from ssl_pipeline.transforms.preprocessing import Preprocessing

SCORES = ("msp", "max_logit", "energy", "knn")


def neighbor_score(features: Tensor, taught: Tensor, k: int = 10) -> Tensor:
    """Minus the distance to the k-th nearest training image, on unit rows (Sun et al. 2022).

    Args:
        features: shape (N, D).
        taught: of the training images, shape (M, D).
        k: at most M.

    Returns:
        Shape (N,).
    """
    bank = F.normalize(taught, dim=1)
    k = min(k, len(bank))
    cosines = [(part @ bank.T).topk(k, dim=1).values[:, -1] for part in F.normalize(features, dim=1).split(1024)]
    return -(2 - 2 * torch.cat(cosines)).clamp_min(0).sqrt()


def scores(logits: Tensor, features: Tensor, taught: Tensor) -> dict[str, Tensor]:
    """Each score of N images, of shape (N,).

    Greatest softmax share (Hendrycks and Gimpel 2017), greatest logit (Hendrycks et al. 2022), minus the free energy
    (Liu et al. 2020), and :func:`neighbor_score`.

    Args:
        logits: shape (N, K).
        features: shape (N, D).
        taught: features of the training images, shape (M, D).
    """
    found = logits.softmax(1).amax(1), logits.amax(1), logits.logsumexp(1), neighbor_score(features, taught)
    return dict(zip(SCORES, found, strict=True))


def _shares_below(values: Tensor, others: Tensor) -> Tensor:
    """Per value the share of others that are smaller; equal ones count half."""
    ordered = others.double().sort().values
    below, upto = (torch.searchsorted(ordered, values.double(), right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(others))


def auroc(known: Tensor, unknown: Tensor) -> float:
    """The chance that a known image scores higher than an unknown one.

    Args:
        known: scores of known images, shape (N,).
        unknown: of unknown ones, shape (M,).
    """
    return float(_shares_below(known, unknown).mean())


def aupr_unknown(known: Tensor, unknown: Tensor) -> float:
    """Average precision at finding the unknown ones, lowest scores first; see :func:`auroc`."""
    both = torch.cat([unknown, known])
    return average_precision(-both, torch.arange(len(both)) < len(unknown))


def fpr_at_95_known(known: Tensor, unknown: Tensor) -> float:
    """The share of unknown images accepted where at least 95 % of the known ones are; see :func:`auroc`."""
    return float((unknown >= threshold(known)).double().mean())


def threshold(known: Tensor) -> float:
    """The highest score that at least 95 % of known images reach."""
    ordered = known.sort(descending=True).values
    return float(ordered[max(1, -(-len(known) * 95 // 100)) - 1])


def oscr(known: Tensor, right: Tensor, unknown: Tensor) -> float:
    """The area under the rate of known images accepted and rightly classified, over the rate of unknown ones accepted.

    By trapezoids over all thresholds (Dhamija et al. 2018); never above the accuracy.

    Args:
        known: scores of known images, shape (N,).
        right: whether each is rightly classified, bool of shape (N,).
        unknown: scores of unknown images, shape (M,).
    """
    return float((_shares_below(known, unknown) * right).mean())


def hos(known_right: Tensor, label: Tensor, unknown_rejected: Tensor) -> float:
    """The harmonic mean of the known classes' mean accuracy and the share of unknown images rejected (Bucci et al. 2020).

    Args:
        known_right: whether each known image was accepted and rightly classified, bool of shape (N,).
        label: their classes, int64 of shape (N,).
        unknown_rejected: bool of shape (M,).
    """
    of_class = torch.stack([known_right[label == c].double().mean() for c in label.unique()])
    accepted, rejected = float(of_class.mean()), float(unknown_rejected.double().mean())
    return 2 * accepted * rejected / (accepted + rejected) if accepted + rejected else 0.0


@torch.no_grad()
def open_set_metrics(
    classifier: Classification,
    taught: IndexedDataset,
    held_back: IndexedDataset | None,
    known: dict[str, IndexedDataset],
    targets: tuple[str, ...],
    unknown: IndexedDataset,
    preprocessing: Preprocessing,
    share: DistInfo,
) -> dict[str, float]:
    """How well the target's unknown images are told from its known ones, per score.

    Under ``full_spectrum`` the known images are the source's and the target's: the shift alone should make nothing unknown
    (Yang et al. 2023). ``hos`` rejects below the score that 95 % of held-out source images reach: no label of the target
    chooses it.

    Args:
        classifier: as it was trained.
        taught: the labeled images that it learned from.
        held_back: labeled images that were held out of them; None takes ``taught`` for the threshold.
        known: per domain the images of known classes to measure on.
        targets: which of the domains are targets.
        unknown: the target's images of unknown classes.
        preprocessing: what the classifier expects.
        share: this process's.
    """

    def outputs(images: IndexedDataset) -> tuple[Tensor, Tensor]:
        return from_features(classifier.read(images, preprocessing, share).features)

    def from_features(features: Tensor) -> tuple[Tensor, Tensor]:
        was_training = classifier.training
        logits = torch.cat([classifier.eval().head(part.to(share.device)).cpu() for part in features.split(1024)])
        classifier.train(was_training)
        return logits, features

    _, bank = outputs(taught)
    read = {name: classifier.read(images, preprocessing, share) for name, images in known.items()}
    of_domain = {name: from_features(rows.features) for name, rows in read.items()}
    sides = {name: scores(*output, bank) for name, output in of_domain.items()}
    strange = scores(*outputs(unknown), bank)
    reference = scores(*outputs(held_back if held_back is not None else taught), bank)
    logits = torch.cat([of_domain[name][0] for name in targets])
    label = torch.cat([read[name].targets for name in targets])
    right = logits.argmax(1) == label
    figures = dict[str, float]()
    for score, of_unknown in strange.items():
        of_known = torch.cat([sides[name][score] for name in targets])
        least = threshold(reference[score])
        figures |= {
            f"open/{score}/auroc": auroc(of_known, of_unknown),
            f"open/{score}/aupr_unknown": aupr_unknown(of_known, of_unknown),
            f"open/{score}/fpr_at_95_known": fpr_at_95_known(of_known, of_unknown),
            f"open/{score}/oscr": oscr(of_known, right, of_unknown),
            f"open/{score}/hos": hos(right & (of_known >= least), label, of_unknown < least),
            f"open/{score}/full_spectrum_auroc": auroc(torch.cat([side[score] for side in sides.values()]), of_unknown),
        }
    return figures
