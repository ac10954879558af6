"""Classification: one class for an image."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.evaluate.probe import fit_linear
from ssl_pipeline.model.bottleneck import build_bottleneck
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.model.head import CosineHead, LinearHead


class Config(DownstreamConfig):
    """Single-label classification by cross-entropy.

    Attributes:
        head: ``linear``, or ``cosine`` (normalised features and weights over a temperature).
        label_smoothing: share of the target that is spread over all classes.
    """

    head: Literal["linear", "cosine"] = "linear"
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def build(self, encoder: Encoder, classes: int) -> Classification:
        """The task on top of an encoder."""
        return Classification(self, encoder, classes)

    def check(self, source: Indexed) -> list[str]:
        """Labels must exist."""
        if source.labels is None or source.classes is None:
            return [
                f"classification needs labels, and {source.name} has none: put the images into one folder per class, "
                "or name another `data`."
            ]
        return []


class Classification(DownstreamTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.classes, self.label_smoothing = encoder, classes, config.label_smoothing
        self.bottleneck, width = build_bottleneck(config.bottleneck, encoder.width)
        self.head = (LinearHead if config.head == "linear" else CosineHead)(width, classes)

    def embed(self, batch: Batch) -> Embeddings:
        """Logits of the first view."""
        return {"logits": self.predict(batch.views[0])}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Cross-entropy; accuracy beside it."""
        assert batch.label is not None
        logits = embeddings["logits"].float()
        loss = F.cross_entropy(logits, batch.label, label_smoothing=self.label_smoothing)
        return StepOutput(loss, {"accuracy": (logits.argmax(1) == batch.label).float().mean()})

    def predict(self, images: Tensor) -> Tensor:
        """Logits of shape (B, classes)."""
        logits: Tensor = self.head(self.neck_features(images))
        return logits

    def fit_head(self, features: Tensor, labels: Tensor, decay: float) -> None:
        """Logistic regression for the linear head; class means for the cosine head, which has no bias to fit."""
        with torch.no_grad():
            if isinstance(self.head, LinearHead):
                weight, bias = fit_linear(features, labels, self.classes, decay)
                self.head.weight.copy_(weight)
                self.head.bias.copy_(bias)
            else:
                assert isinstance(self.head, CosineHead)
                members = F.one_hot(labels, self.classes).float()
                self.head.weight.copy_(members.T @ F.normalize(features, dim=1))

    def score(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, and the mean of the classes' accuracies."""
        right = (predictions.argmax(1) == labels).float()
        of_class = [right[labels == c].mean() for c in labels.unique()]
        return {"accuracy": float(right.mean()), "class_mean_accuracy": float(torch.stack(of_class).mean())}
