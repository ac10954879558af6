"""Classification: one class for an image.

    ℓ = −log softmax(W f(x) + b)_y

When to use: every image is of exactly one class. The first metric is accuracy; ``class_mean_accuracy`` counts rare
classes as much as frequent ones. On a frozen encoder it is the linear probe (Alain and Bengio 2017, arXiv
1610.01644).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.pooled_task import PooledConfig, PooledTask, targets_of
from ssl_pipeline.downstream.task import balanced_weights, measured, unseen_classes
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.metrics.linear_probe import fit_linear
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.heads import CosineHead, LinearHead


class Config(PooledConfig):
    """Single-label classification by cross-entropy.

    Attributes:
        head: ``linear``, or ``cosine`` (normalized features and weights over a temperature).
        label_smoothing: share of the target that is spread over all classes; the solved probe has none.
        class_weights: ``balanced`` weights a sample by one over its class's number of training labels (mean 1).
    """

    gives = "classes"
    pipeline_tag = "image-classification"
    head: Literal["linear", "cosine"] = "linear"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = "none"

    def build(self, encoder: Encoder, classes: int) -> Classification:
        return Classification(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        return check_labels("classification", source, held_out)

    def strata(self, source: IndexedDataset) -> Tensor | None:
        return source.labels


def check_labels(task: str, source: IndexedDataset, held_out: IndexedDataset | None) -> list[str]:
    """What is wrong with the class labels of training and of the images to measure on, as sentences."""
    if source.labels is None or source.classes is None:
        reason = source.unlabeled_because or "put the images into one folder per class, or name another `data`."
        return [f"{task} needs labels, and {source.name} has none: {reason}"]
    present = source.labels[source.labels >= 0].unique().tolist()
    if len(present) == 1:  # none at all is what a method without source images has
        return [
            f"{task} needs images of at least two classes, and all training images of {source.name} are of the class "
            f"{source.classes[present[0]]!r}: add images of another."
        ]
    if held_out is None or held_out.labels is None:
        return []
    every, count = torch.arange(len(source.classes)), int((held_out.labels < 0).sum())
    known, wanted = (torch.isin(every, labels) for labels in (source.labels, held_out.labels))
    problems = unseen_classes(held_out, "image", source.classes, known, wanted)
    if count:
        problems.append(f"{held_out.name}: {count} images to measure on have no label: label them, or take them out.")
    return problems


class Classification(PooledTask):
    """See :class:`Config`."""

    class_weight: Tensor

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__(config, encoder)
        self.classes, self.label_smoothing = classes, config.label_smoothing
        self.balanced = config.class_weights == "balanced"
        self.head = (LinearHead if config.head == "linear" else CosineHead)(self.width, classes)
        self.register_buffer("class_weight", torch.ones(classes))

    def look_at(self, train: IndexedDataset) -> None:
        if self.balanced:
            counts = targets_of(train).bincount(minlength=self.classes).to(self.class_weight)
            self.class_weight.copy_(balanced_weights(counts))

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        assert batch.label is not None
        loss = self.supervised(embeddings["logits"], batch.label)
        return StepOutput(loss, {"accuracy": (embeddings["logits"].argmax(1) == batch.label).float().mean()})

    def supervised(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy of logits (B, K) on labels (B,), a scalar."""
        return F.cross_entropy(logits.float(), label, self.class_weight, label_smoothing=self.label_smoothing)

    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        """Logistic regression for the linear head; class means for the cosine head, which has no bias to fit."""
        if isinstance(self.head, LinearHead):
            self.head.assign(*fit_linear(features, targets, self.classes, decay, class_weight=self.class_weight))
        else:
            assert isinstance(self.head, CosineHead)
            members = F.one_hot(targets, self.classes).float()
            with torch.no_grad():
                self.head.weight.copy_(members.T @ F.normalize(features, dim=1))

    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Accuracy, and the mean of the classes' accuracies.

        A class without an image has no accuracy: it is left out of the mean, and ``classes_measured`` says how many are in it.
        """
        right = (predictions.argmax(1) == targets).float()
        of_class = [right[targets == c].mean() for c in targets.unique()]
        means = {"accuracy": float(right.mean()), "class_mean_accuracy": float(torch.stack(of_class).mean())}
        return means | measured("classes", len(of_class), predictions.shape[1])
