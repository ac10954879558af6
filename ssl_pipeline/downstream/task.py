"""The contract of a downstream task: a stage-two task that also predicts and is measured.

There are two kinds, by what the head reads: a row of features (``downstream.pooled_task``) or maps (``downstream.dense_task``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.engine.task import Embeddings, Task
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing


class DownstreamTask(Task, ABC):
    """An encoder and a head.

    Attributes:
        head: features to the prediction.
        reads_maps: whether the head reads the encoder's maps, rather than a row of features.
        head_is_solved: whether ``fit_head`` finds the best head on fixed features; otherwise the loop trains it.
        backbone_lr_factor: the encoder's share of the learning rate.
        layer_decay: a layer's share of the rate of the layer after it (Clark et al. 2020).
        encoder_is_fixed: whether the encoder keeps its weights and statistics while the task trains.
    """

    reads_labels = True
    head_is_solved: ClassVar[bool]
    reads_maps: ClassVar[bool] = False
    head: nn.Module
    backbone_lr_factor: float = 1.0
    layer_decay: float = 1.0
    encoder_is_fixed: bool = False

    @abstractmethod
    def predict(self, images: Tensor) -> Any:
        """The prediction for normalized images (B, C, H, W), one entry a sample."""

    def embed(self, batch: Batch) -> Embeddings:
        return {"logits": self.predict(batch.views[0])}

    def prepare(self, images: list[Image.Image], preprocessing: Preprocessing) -> Tensor:
        """Decoded images as ``predict`` wants them, float32 of shape (B, C, H, W)."""
        return preprocessing.of_files(images)

    @abstractmethod
    def evaluate(self, source: IndexedDataset, preprocessing: Preprocessing, share: DistInfo) -> dict[str, float]:
        """Metrics on a source by name; selection goes by the first one, and larger is better."""

    def look_at(self, train: IndexedDataset) -> None:
        """Learns class weights or a value's mean from the training labels, before the first step."""

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Fits buffers of no fixed size to weights that are about to be loaded."""

    def train(self, mode: bool = True) -> DownstreamTask:
        super().train(mode)
        if self.encoder_is_fixed:
            self.encoder.eval()
        return self

    def fix_encoder(self, fixed: bool) -> None:
        """Whether the encoder takes part in training."""
        self.encoder_is_fixed = fixed
        self.encoder.learn(self.reads_maps)
        if fixed:
            self.encoder.requires_grad_(False)

    def param_groups(self) -> list[dict[str, Any]]:
        layers, top = self.encoder.layer_ids()
        groups: dict[float, list[Any]] = {1.0: []}
        for name, parameter in self.named_parameters():
            factor = 1.0
            if name.startswith("encoder."):
                factor = self.backbone_lr_factor * self.layer_decay ** (top - layers[name.removeprefix("encoder.")])
            if parameter.requires_grad:
                groups.setdefault(factor, []).append((name, parameter))
        return [{"params": params, "lr_factor": factor} for factor, params in groups.items()]


class DownstreamConfig(ComponentConfig, ABC):
    """The base of every downstream task's ``Config``.

    Attributes:
        selects: whether validation labels choose something; a task that chooses nothing keeps them for training.
        in_percent: whether the metrics are shares, printed in %.
        gives: the kind of prediction: ``classes`` and ``labels`` (logits an image), ``values``, ``mask`` (logits a pixel), ``boxes``;
            others are not printed.
        pipeline_tag: the task's name on the Hugging Face Hub; None where it has none.
        reads_square: whether an image is read as its central square, rather than whole, resized to a square.
    """

    selects: ClassVar[bool] = True
    in_percent: ClassVar[bool] = True
    gives: ClassVar[str] = "other"
    pipeline_tag: ClassVar[str | None] = None
    reads_square: ClassVar[bool] = True

    @abstractmethod
    def build(self, encoder: Encoder, classes: int) -> DownstreamTask:
        """The task on top of an encoder, for a number of classes or values."""

    @abstractmethod
    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        """What the training images, or those to measure on, lack for this task, as sentences."""

    def check_regime(self, regime: str) -> list[str]:
        """What does not go together with a regime, as sentences."""
        return []

    def check_views(self, views: ViewsConfig) -> list[str]:
        """What views do that the task's labels can't follow, as sentences."""
        return []

    def strata(self, source: IndexedDataset) -> Tensor | None:
        """The classes that label draws are even over: int64 of shape (N,), −1 where unknown; None where an image has no one class."""
        return None


def unseen_classes(
    source: IndexedDataset, what: str, names: Sequence[str], known: Iterable[object], wanted: Iterable[object]
) -> list[str]:
    """A sentence where images or masks (``what``) to measure on have classes (``wanted``) that training lacks (``known``)."""
    unseen = [repr(name) for name, here, there in zip(names, known, wanted, strict=True) if there and not here]
    if not unseen:
        return []
    return [
        f"{source.name}: {what}s to measure on hold classes that no training {what} has: {', '.join(unseen)}. Nothing could learn "
        "them: add training images, or take these out."
    ]


def balanced_weights(counts: Tensor) -> Tensor:
    """One over each class's count, with a mean of 1 over all samples; 0 labels count as one: (K,) to (K,)."""
    return counts.sum() / (counts.clamp_min(1) * (counts > 0).sum())


def measured(what: str, count: int, of: int) -> dict[str, float]:
    """The metric ``{what}_measured`` where not all of them could be measured."""
    return {} if count == of else {f"{what}_measured": float(count)}
