"""Multi-label classification: any number of the labels hold for an image.

    ℓ = mean over the known labels of −[ y log σ(s) + (1 − y) log(1 − σ(s)) ],   s = W f(x) + b

When to use: several things may be true of an image at once, and some may not be known. The first metric is the mean
average precision, which needs no threshold.
"""

from __future__ import annotations

from statistics import fmean

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.pooled_task import PooledConfig, PooledTask, check_numbers
from ssl_pipeline.downstream.task import measured
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.metrics.classification import average_precision
from ssl_pipeline.metrics.linear_probe import fit_labels, known_mean
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.heads import LinearHead


class Config(PooledConfig):
    """Several labels of 0 and 1, each by its own binary cross-entropy; one that is not known counts for nothing."""

    gives = "labels"
    pipeline_tag = "image-classification"

    def build(self, encoder: Encoder, classes: int) -> MultiLabel:
        return MultiLabel(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        def fault(column: Tensor) -> str | None:
            found = column[~column.isnan()].unique().tolist()
            other = [value for value in found if value not in (0.0, 1.0)]
            if other:
                return f"holds {other[0]:g}, and a label is 0 or 1; numbers are downstream=regression."
            return f"is {found[0]:g} in every training image: leave the column out." if len(found) < 2 else None

        needs = (
            "each label is the same in all images to measure on, and nothing can be measured: add images to them that have the "
            "labels, and images that have not."
        )
        return check_numbers(
            "multi-label classification", source, held_out, fault, lambda column: bool(_vary(column)), needs
        )


class MultiLabel(PooledTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__(config, encoder)
        self.classes = classes
        self.head: LinearHead = LinearHead(self.width, classes)

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        logits = embeddings["logits"].float()
        return StepOutput(known_mean(F.binary_cross_entropy_with_logits, logits, batch.target).mean())

    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        self.head.assign(*fit_labels(features, targets, decay))

    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean average precision over the labels, and the labels' mean F1 at a probability of one half.

        A label that is 0, or 1, in all images where it is known has the same average precision whatever the model says: it is
        left out of both means, and ``labels_measured`` says how many are in them.
        """
        varying, precisions, f1s = _vary(targets).nonzero()[:, 0].tolist(), [], []
        for label in varying:
            known = ~targets[:, label].isnan()
            logits, truth = predictions[known, label], targets[known, label] == 1
            # Of the logits and not of probabilities, which are all 1 where a model is sure: their order would be lost.
            precisions.append(average_precision(logits, truth))
            f1s.append(float(binary_f1_score((logits > 0).long(), truth.long())))
        metrics = {"mean_average_precision": fmean(precisions), "f1": fmean(f1s)} if varying else {}
        return metrics | measured("labels", len(varying), targets.shape[1])


def _vary(targets: Tensor) -> Tensor:
    """Which labels (N, K) are 0 in some image and 1 in another, bool of shape (K,)."""
    return (targets == 0).any(0) & (targets == 1).any(0)
