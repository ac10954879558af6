"""What can be said of a model on a target without its labels: the figures that may choose a method or a setting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.certainty import entropy
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.preprocessing import Preprocessing

_MOST = 4000


def soft_neighborhood_density(logits: Tensor, temperature: float = 0.05) -> float:
    """How densely the predictions lie: larger is better (Saito et al. 2021).

    Args:
        logits: shape (N, K).
        temperature: divides the similarities of the normalized shares.
    """
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
    """``label_free/entropy`` (smaller is better), ``label_free/snd`` (larger is better), and ``source_validation`` where labels are held out.

    Args:
        classifier: as it was trained.
        target: its training images; labels are not read.
        validation: labeled images of the source that were held out.
        preprocessing: what the classifier expects.
        share: this process's.
    """
    # The density compares all pairs. Files come class by class, so that the first ones would be of a few classes alone.
    index = permutation(len(target), "label-free selection")[:_MOST].sort().values
    logits = extract(classifier, target, preprocessing, share, index, classifier.predict)
    figures = {
        "label_free/entropy": float(entropy(logits).mean()),
        "label_free/snd": soft_neighborhood_density(logits),
    }
    if validation is not None:
        figures["source_validation"] = classifier.evaluate(validation, preprocessing, share)["accuracy"]
    return figures
