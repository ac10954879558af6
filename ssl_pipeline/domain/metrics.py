"""Metrics of a classifier across domains: without labels of the target, between domains, and on unknown classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.losses import entropy
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.pooled_task import Rows
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.metrics import open_set
from ssl_pipeline.metrics.classification import auroc
from ssl_pipeline.metrics.linear_probe import fit_linear
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.preprocessing import Preprocessing

_MOST_IMAGES = 4000  # for metrics that compare all pairs
_MOST_ROWS = 1000
_DECAY = 1e-3


def soft_neighborhood_density(logits: Tensor, temperature: float = 0.05) -> float:
    """How densely the predictions (N, K) lie, by the cosines of their probabilities: larger is better (Saito et al. 2021)."""
    rows = F.normalize(logits.softmax(1), dim=1)
    similarity = (rows @ rows.T / temperature).fill_diagonal_(-1e4)
    return float(entropy(similarity).mean())


@torch.no_grad()
def unlabeled_metrics(
    classifier: Classification,
    target: IndexedDataset,
    validation: IndexedDataset | None,
    preprocessing: Preprocessing,
    share: DistInfo,
) -> dict[str, float]:
    """Metrics that may choose a method or a setting, as they read no label of the target's training images.

    ``label_free/entropy`` (smaller is better), ``label_free/snd`` (larger is better), and ``source_validation`` where labeled
    images of the source are held out (``validation``).
    """
    # Drawn, because files come class by class.
    index = permutation(len(target), "label-free selection")[:_MOST_IMAGES].sort().values
    logits = extract(classifier, target, preprocessing, share, index, classifier.predict)
    found = {"label_free/entropy": float(entropy(logits).mean()), "label_free/snd": soft_neighborhood_density(logits)}
    if validation is not None:
        found["source_validation"] = classifier.evaluate(validation, preprocessing, share)["accuracy"]
    return found


def proxy_a_distance(first: Tensor, second: Tensor) -> float:
    r"""The proxy A-distance (Ben-David et al. 2007): how well a linear classifier separates the domains.

    .. math:: 2 (1 - 2 \varepsilon), \qquad \varepsilon \text{ the error on the half that it was not fitted on}

    Each half is fitted once and the two errors are averaged; as many rows (N, D) and (M, D) of both domains count, up to 1,000, at
    least 2. 0 where the domains can't be separated (a worse guess than chance is chance), 2 where they always can.
    """
    count = min(len(first), len(second), _MOST_ROWS)
    # Drawn, because rows may be in the order of their classes; of two equally long sets the same rows are in a half.
    sides = [side[permutation(len(side), "proxy A-distance")[:count]] for side in (first, second)]
    halves = [[side[part::2] for side in sides] for part in (0, 1)]
    errors = [_domain_error(fitted, held_out) for fitted, held_out in (halves, halves[::-1])]
    return max(0.0, 2 * (1 - sum(errors)))


def _domain_error(fitted: list[Tensor], held_out: list[Tensor]) -> float:
    rows, labels = torch.cat(fitted), torch.cat([torch.full((len(s),), n) for n, s in enumerate(fitted)])
    weight, bias = fit_linear(rows, labels, 2, _DECAY)
    wrong = [(side @ weight.T + bias).argmax(1) != number for number, side in enumerate(held_out)]
    return float(torch.cat(wrong).double().mean())


@torch.no_grad()
def open_set_metrics(
    classifier: Classification,
    learned: Rows,
    held_out: Rows | None,
    known: dict[str, Rows],
    targets: tuple[str, ...],
    unknown: Rows,
    device: torch.device,
) -> dict[str, float]:
    """How well each score separates the target's unknown images from its known ones.

    Under ``full_spectrum`` the known images are the source's and the target's: the shift alone should make nothing unknown
    (Yang et al. 2023). ``hos`` rejects below the score that 95 % of held-out source images reach (of those learned from, where
    none are held out): no label of the target chooses it.
    """

    def logits(rows: Rows) -> Tensor:
        return torch.cat([classifier.head(part.to(device)).cpu() for part in rows.features.split(1024)])

    def scores(rows: Rows) -> dict[str, Tensor]:
        return open_set.scores(logits(rows), rows.features, learned.features)

    of_domain, of_unknown = {name: scores(rows) for name, rows in known.items()}, scores(unknown)
    of_held_out = scores(held_out or learned)
    label = torch.cat([known[name].targets for name in targets])
    right = torch.cat([logits(known[name]) for name in targets]).argmax(1) == label
    found = dict[str, float]()
    for name, strange in of_unknown.items():
        of_known = torch.cat([of_domain[domain][name] for domain in targets])
        least = open_set.threshold(of_held_out[name])
        found |= {
            f"open/{name}/auroc": auroc(of_known, strange),
            f"open/{name}/aupr_unknown": open_set.aupr_unknown(of_known, strange),
            f"open/{name}/fpr_at_95_known": open_set.fpr_at_95_known(of_known, strange),
            f"open/{name}/oscr": open_set.oscr(of_known, right, strange),
            f"open/{name}/hos": open_set.hos(right & (of_known >= least), label, strange < least),
            f"open/{name}/full_spectrum_auroc": auroc(torch.cat([s[name] for s in of_domain.values()]), strange),
        }
    return found
