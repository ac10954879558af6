"""Semantic segmentation: a class for every pixel.

    ℓ = mean over the known pixels of −log softmax(s(x))_y

When to use: what is where, without separating the objects of a class. The first metric is the mean
intersection over union. Long et al. 2015, arXiv 1411.4038; Chen et al. 2017, arXiv 1706.05587.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset, annotations_of
from ssl_pipeline.data.targets import IGNORE, Masks
from ssl_pipeline.downstream.dense_task import DenseConfig, DenseTask
from ssl_pipeline.downstream.task import balanced_weights, measured, unseen_classes
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.metrics.classification import confusion_matrix
from ssl_pipeline.models.dense_heads import DeepLab, SkipHead
from ssl_pipeline.models.encoder import Encoder


class Config(DenseConfig):
    """Segmentation by cross-entropy over the pixels; those of value 255 count for nothing.

    Attributes:
        head: ``fcn``: a linear layer on every level of the maps, summed from coarse to fine (Long et al. 2015), on a frozen
            encoder a linear probe of each pixel. ``deeplab``: atrous pyramid pooling of the last level (Chen et al. 2017), its rates scaled to the map.
        class_weights: ``balanced`` weighs a pixel by one over its class's number of training pixels (mean 1).
    """

    gives = "mask"
    pipeline_tag = "image-segmentation"
    head: Literal["fcn", "deeplab"] = "fcn"
    class_weights: Literal["none", "balanced"] = "none"

    def build(self, encoder: Encoder, classes: int) -> Segmentation:
        return Segmentation(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        masks = annotations_of(source, Masks)
        held = masks if held_out is None else annotations_of(held_out, Masks)
        if masks is None or held is None:
            return [f"segmentation needs masks, and {source.name} has none: take data=mask_folder."]
        known, wanted = masks.counts.sum(0) > 0, held.counts.sum(0) > 0
        problems = []
        if int(known.sum()) < 2:
            problems.append(
                f"{source.name}: the training masks hold fewer than two classes, and there is nothing to tell apart."
            )
        return problems + unseen_classes(source, "mask", masks.names, known, wanted)


class Segmentation(DenseTask):
    """See :class:`Config`."""

    class_weight: Tensor

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__(encoder)
        self.classes, self.balanced = classes, config.class_weights == "balanced"
        self.head = SkipHead(encoder.widths, classes) if config.head == "fcn" else DeepLab(encoder.widths, classes)
        self.register_buffer("class_weight", torch.ones(classes))

    def look_at(self, train: IndexedDataset) -> None:
        masks = annotations_of(train, Masks)
        if self.balanced and masks is not None:
            self.class_weight.copy_(balanced_weights(masks.counts.sum(0).to(self.class_weight)))

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        logits = embeddings["logits"].float()
        losses = F.cross_entropy(logits, batch.target, self.class_weight, ignore_index=IGNORE, reduction="none")
        known = batch.target != IGNORE
        weight = self.class_weight[batch.target.where(known, 0)] * known
        right = (logits.argmax(1) == batch.target)[known].float().mean()
        return StepOutput(losses.sum() / weight.sum().clamp_min(1e-6), {"pixel_accuracy": right})

    def predict(self, images: Tensor) -> Tensor:
        """Logits of every pixel, of shape (B, classes, H, W)."""
        logits: Tensor = self.head(self.encoder.feature_maps(images))
        return F.interpolate(logits.float(), images.shape[2:], mode="bilinear", align_corners=False)

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        """How many pixels of each class (rows) were taken for each (columns), int64 of shape (classes, classes)."""
        logits = F.interpolate(prediction[None], target.shape, mode="bilinear", align_corners=False)[0]
        return confusion_matrix(logits.argmax(0), target.where(target != IGNORE, -1), self.classes).cpu()

    def score(self, compared: list[Tensor]) -> dict[str, float]:
        """Mean intersection over union of the classes that occur, and the share of pixels that are right.

        Where some classes do not occur, ``classes_measured`` says how many do.
        """
        confusion = torch.stack(compared).sum(0).double()
        right, occurs = confusion.diag(), confusion.sum(1) > 0
        count = int(occurs.sum())
        if not count:
            return measured("classes", 0, len(confusion))
        union = confusion.sum(0) + confusion.sum(1) - right
        metrics = {
            "mean_iou": (right / union.clamp_min(1))[occurs].mean(),
            "pixel_accuracy": right.sum() / confusion.sum(),
        }
        return {name: float(value) for name, value in metrics.items()} | measured("classes", count, len(confusion))
