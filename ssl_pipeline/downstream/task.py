"""The contract of a downstream task: a stage-two task that also predicts and is measured.

Two kinds stand below it, by what a head reads: a row of features (``downstream.vector``) or maps (``downstream.dense``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.engine.task import Task
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.layers import head_layer, layer_of
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing


class DownstreamTask(Task, ABC):
    """An encoder and a head.

    Attributes:
        head: features to the prediction.
        reads_maps: whether the head reads the encoder's maps, rather than a row of features.
        head_is_solved: whether ``fit_head`` finds the best head on fixed features; otherwise the loop trains it.
        backbone_lr_factor: the encoder's share of the learning rate.
        layer_decay: what a layer's rate is of that of the layer after it (Clark et al. 2020).
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

    def prepare(self, images: list[Image.Image], preprocessing: Preprocessing) -> Tensor:
        """Decoded images as ``predict`` wants them, float32 of shape (B, C, H, W)."""
        return preprocessing.of_files(images)

    @abstractmethod
    def evaluate(self, source: IndexedDataset, preprocessing: Preprocessing, share: DistInfo) -> dict[str, float]:
        """Named figures on a source; the first one is what selection looks at, and larger is better."""

    def look_at(self, train: IndexedDataset) -> None:
        """What must be known of the training labels before the first step: class weights, a value's mean."""
        del train

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Fits what has no fixed size to weights that are about to be loaded."""
        del state

    def train(self, mode: bool = True) -> DownstreamTask:
        """As torch's; an encoder that is fixed stays in evaluation mode."""
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
        """The head with all of the rate, and the encoder's layers with theirs: the nearer to the image, the smaller."""
        layers, top = layer_of(self.encoder), head_layer(self.encoder)
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
        in_percent: whether the figures are shares, to be told in %.
        gives: what a prediction is, for those that tell it to people: ``classes`` and ``labels`` (logits an image), ``values``, ``mask``
            (logits a pixel), ``boxes``; a task with another kind is not told.
        pipeline_tag: what the Hugging Face Hub calls such a task; None where it has no name for it.
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
        del regime
        return []

    def check_views(self, views: ViewsConfig) -> list[str]:
        """What views do that the task's labels can't follow, as sentences."""
        del views
        return []

    def strata(self, source: IndexedDataset) -> Tensor | None:
        """What label draws are even over: int64 of shape (N,), −1 where nothing is known; None: an image has no one class."""
        del source
        return None
