"""The contract of a downstream task: a stage-two task that also predicts and is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.engine.task import Task
from ssl_pipeline.model.bottleneck import BottleneckConfig
from ssl_pipeline.model.encoder import Encoder


class DownstreamTask(Task, ABC):
    """An encoder, perhaps a bottleneck, and a head.

    Attributes:
        bottleneck: features to fewer features; the identity by default.
        head: features to the prediction.
        backbone_lr_factor: the encoder's share of the learning rate.
    """

    reads_labels = True
    bottleneck: nn.Module
    head: nn.Module
    backbone_lr_factor: float = 1.0

    def neck_features(self, images: Tensor) -> Tensor:
        """What the head reads, of shape (B, D)."""
        features: Tensor = self.bottleneck(self.encoder.features(images))
        return features

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """The prediction for normalised images (B, C, H, W), one row a sample."""

    @abstractmethod
    def fit_head(self, features: Tensor, labels: Tensor, decay: float) -> None:
        """The probe: sets the head to the best one on fixed features."""

    @abstractmethod
    def score(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """Named figures of predictions; the first one is what selection looks at, and larger is better."""

    def param_groups(self) -> list[dict[str, Any]]:
        """The encoder with its share of the rate; bottleneck and head with all of it."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        encoder = [(name, parameter) for name, parameter in named if name.startswith("encoder.")]
        rest = [(name, parameter) for name, parameter in named if not name.startswith("encoder.")]
        return [{"params": rest, "lr_factor": 1.0}, {"params": encoder, "lr_factor": self.backbone_lr_factor}]


class DownstreamConfig(ComponentConfig, ABC):
    """The base of every downstream task's ``Config``."""

    bottleneck: BottleneckConfig = BottleneckConfig()

    @abstractmethod
    def build(self, encoder: Encoder, classes: int) -> DownstreamTask:
        """The task on top of an encoder."""

    @abstractmethod
    def check(self, source: Indexed) -> list[str]:
        """What the source lacks for this task, as sentences."""
