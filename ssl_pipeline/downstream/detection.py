"""Object detection: boxes and their classes.

    ℓ = ℓ(objectness) + ℓ(proposal boxes) + ℓ(class) + ℓ(class boxes)

cross-entropies for the first and third, smooth L1 on the boxes' offsets for the others.

When to use: single objects are to be found and counted. The first metric is COCO's mean average precision. Ren et al.
2015, arXiv 1506.01497; Lin et al. 2017, arXiv 1612.03144.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset, annotations_of
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.targets import Boxes
from ssl_pipeline.downstream.dense_task import DenseConfig, DenseTask
from ssl_pipeline.downstream.task import measured, unseen_classes
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.models.batch_norm import batch_norms, have_statistics
from ssl_pipeline.models.dense_heads import FasterRCNNHead, PyramidRetinaNetHead
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.transforms.preprocessing import Preprocessing


class Config(DenseConfig):
    """Boxes by a detector with a feature pyramid over the encoder (Lin et al. 2017).

    Attributes:
        head: ``faster_rcnn``, which proposes regions first (Ren et al. 2015), or ``retinanet``, which decides at once, with a focal
            loss; it has neither ``hidden`` nor ``rpn_post_nms_top_n`` nor ``box_batch_size_per_image``.
        width: channels of the pyramid.
        hidden: width of the box head.
        rpn_post_nms_top_n: regions of an image that the box head is given at most.
        box_batch_size_per_image: regions of an image that are learned from in a step, at most a quarter of them objects.
        score_threshold: predictions below it are dropped.
        batch_norm: of the encoder. ``frozen``: statistics, scales and shifts stay as pretraining left them, as in torchvision's
            detectors: a step has few images, and their statistics are noise. Fresh weights have none to keep, and are trained.
            ``trained``: they go by each batch and learn.
    """

    gives = "boxes"
    pipeline_tag = "object-detection"
    head: Literal["faster_rcnn", "retinanet"] = "faster_rcnn"
    width: int = Field(256, ge=1)
    hidden: int = Field(1024, ge=1)
    rpn_post_nms_top_n: int = Field(1000, ge=1)
    box_batch_size_per_image: int = Field(512, ge=4)
    score_threshold: float = Field(0.05, ge=0, lt=1)
    batch_norm: Literal["frozen", "trained"] = "frozen"

    def build(self, encoder: Encoder, classes: int) -> Detection:
        return Detection(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        boxes = annotations_of(source, Boxes)
        held = boxes if held_out is None else annotations_of(held_out, Boxes)
        if boxes is None or held is None:
            return [f"detection needs boxes, and {source.name} has none: take data=coco."]
        problems = []
        if importlib.util.find_spec("pycocotools") is None:
            problems.append(
                'detection is measured by pycocotools, which is not installed: pip install -e ".[detection]" in the project\'s folder.'
            )
        known, wanted = boxes.counts(), held.counts()
        for counts, where in ((known, "training images"), (wanted, "images to measure on")):
            if not bool(counts.any()):
                problems.append(f"{source.name}: the {where} hold no box: annotate some.")
        return problems + unseen_classes(source, "image", boxes.names, known, wanted)


class Detection(DenseTask):
    """See :class:`Config`."""

    head: FasterRCNNHead | PyramidRetinaNetHead
    _freezes_norms = False  # until there is an encoder

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__(encoder)
        self.classes = classes
        self._freezes_norms = config.batch_norm == "frozen" and have_statistics(encoder)
        self._freeze_norms()
        if config.head == "retinanet":
            self.head = PyramidRetinaNetHead(
                encoder.widths,
                encoder.strides,
                classes,
                config.width,
                score_thresh=config.score_threshold,
                detections_per_img=100,
            )
            return
        self.head = FasterRCNNHead(
            encoder.widths, encoder.strides, classes, config.width, config.hidden,
            rpn_post_nms_top_n_train=config.rpn_post_nms_top_n, rpn_post_nms_top_n_test=config.rpn_post_nms_top_n,
            box_batch_size_per_image=config.box_batch_size_per_image, box_score_thresh=config.score_threshold,
        )  # fmt: skip

    def _freeze_norms(self) -> None:
        if self._freezes_norms:
            for norm in batch_norms(self.encoder):
                norm.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Detection:
        super().train(mode)
        self._freeze_norms()
        return self

    def fix_encoder(self, fixed: bool) -> None:
        super().fix_encoder(fixed)
        self._freeze_norms()

    def embed(self, batch: Batch) -> Embeddings:
        return self.encoder.feature_maps(batch.views[0])

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        losses = self.head.losses(embeddings, batch.views[0].shape[-1], batch.target)
        return StepOutput(
            torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}
        )

    def predict(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Per image ``boxes`` (n, 4) in shares of its width and height, ``labels`` (n,) and ``scores`` (n,), best first."""
        size = images.shape[-1]
        found = self.head.detect(self.encoder.feature_maps(images), size)
        return [{**one, "boxes": one["boxes"] / size} for one in found]

    def evaluate(self, source: IndexedDataset, preprocessing: Preprocessing, share: DistInfo) -> dict[str, float]:
        boxes = annotations_of(source, Boxes)
        assert boxes is not None
        count = int((boxes.counts() > 0).sum())
        return super().evaluate(source, preprocessing, share) | measured("classes", count, len(boxes.names))

    def compare(self, prediction: dict[str, Tensor], target: dict[str, Tensor]) -> Any:
        height, width = target["size"].float()
        scaled = {**prediction, "boxes": prediction["boxes"] * torch.stack([width, height, width, height])}
        return tuple({key: value.cpu() for key, value in one.items()} for one in (scaled, target))

    def score(self, compared: list[Any]) -> dict[str, float]:
        """COCO's average precision over IoUs from 0.5 to 0.95, at 0.5 and at 0.75, and recall with 100 boxes an image.

        As COCO measures: means over the classes that have a box; a prediction in a crowd of its class that matches no box is not
        counted. Without any box there are no figures.
        """
        from torchmetrics.detection import MeanAveragePrecision

        # COCO's own thresholds: torchmetrics' are float32, and a recall of 3 in 10 would fall below one of 0.3.
        overlaps, recalls = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
        measure = MeanAveragePrecision(iou_thresholds=overlaps, rec_thresholds=recalls, backend="pycocotools")
        measure.warn_on_many_detections = False
        measure.update([prediction for prediction, _ in compared], [truth for _, truth in compared])
        figures = measure.compute()
        named = {"map": "map", "map_50": "map_50", "map_75": "map_75", "mar_100": "recall_100"}
        # COCO's −1: there was nothing to find.
        return {name: float(figures[key]) for key, name in named.items() if float(figures[key]) >= 0}
