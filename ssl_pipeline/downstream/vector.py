"""Tasks whose head reads one row of features for an image, and whose head is solved on fixed features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.targets import NumericTargets, annotations_of
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.models.bottleneck import BottleneckConfig, build_bottleneck
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class Rows:
    """Images as a head reads them.

    Attributes:
        features: float32 of shape (N, D).
        targets: as :func:`targets_of` has them.
        index: which of the source's images they are, int64 of shape (N,): those that can't be decoded are missing.
    """

    features: Tensor
    targets: Tensor
    index: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(self.features.to(device), self.targets.to(device), self.index)

    def only(self, chosen: Tensor) -> Rows:
        """Those of a mask, bool of shape (N,)."""
        return Rows(self.features[chosen], self.targets[chosen], self.index[chosen.cpu()])


class PooledTask(DownstreamTask):
    """An encoder, perhaps a bottleneck, and a head; evaluation looks at an image's central square.

    Attributes:
        bottleneck: features to fewer features; the identity by default.
        width: the features that the head reads.
    """

    head_is_solved = True

    def __init__(self, config: PooledConfig, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck: nn.Module
        self.bottleneck, self.width = build_bottleneck(config.bottleneck, encoder.width)

    def neck_features(self, images: Tensor) -> Tensor:
        """What the head reads, of shape (B, D)."""
        return self.through_bottleneck(self.encoder.features(images))

    def through_bottleneck(self, features: Tensor) -> Tensor:
        """What the head reads of the encoder's features: (N, encoder's width) to (N, D)."""
        rows: Tensor = self.bottleneck(features)
        return rows

    def predict(self, images: Tensor) -> Tensor:
        """What the head makes of it, of shape (B, K)."""
        return self.of_features(self.neck_features(images))

    def of_features(self, features: Tensor) -> Tensor:
        """What ``predict`` makes of features (B, D)."""
        prediction: Tensor = self.head(features)
        return prediction

    @abstractmethod
    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        """The probe: sets the head to the best one on fixed features.

        Args:
            features: float32 of shape (N, D).
            targets: as :func:`targets_of` has them.
            decay: the weight decay.
        """

    @abstractmethod
    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Named figures of predictions (N, K); the first one is what selection looks at, and larger is better."""

    def evaluate(self, source: IndexedDataset, preprocessing: Preprocessing, share: DistInfo) -> dict[str, float]:
        """The figures of all predictions, each sample exactly once."""
        rows = self.read(source, preprocessing, share)
        return self.evaluate_features(rows.features, rows.targets)

    def read(
        self,
        source: IndexedDataset,
        preprocessing: Preprocessing,
        share: DistInfo,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> Rows:
        """What the head reads of a source's images, or what ``forward`` makes of them; those that can't be decoded are left out."""
        forward = forward or self.neck_features
        features, index = extract_readable(self, source, preprocessing, share, forward=forward)
        return Rows(features, targets_of(source)[index], index)

    @torch.no_grad()
    def evaluate_features(self, features: Tensor, targets: Tensor) -> dict[str, float]:
        device = next(iter(self.head.state_dict().values())).device
        return self.score(self.of_features(features.to(device)).float().cpu(), targets)


class PooledConfig(DownstreamConfig):
    """The base of the ``Config`` of tasks on a row of features.

    Attributes:
        bottleneck: a narrow layer between features and head.
    """

    bottleneck: BottleneckConfig = BottleneckConfig()

    def check_regime(self, regime: str) -> list[str]:
        """A frozen regime trains no bottleneck."""
        if regime == "frozen" and self.bottleneck.width is not None:
            return ["`downstream.bottleneck` is new and must be trained, and regime `frozen` trains the head alone."]
        return []


def targets_of(source: IndexedDataset) -> Tensor:
    """What a head is to predict of a source that was checked: numbers (N, K), or class labels, int64 of shape (N,)."""
    numbers = annotations_of(source, NumericTargets)
    if numbers is not None:
        return numbers.values
    assert source.labels is not None
    return source.labels
