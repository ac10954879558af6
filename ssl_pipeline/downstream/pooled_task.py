"""Tasks whose head reads one row of features for an image, and whose head is solved on fixed features."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_pipeline.data.dataset import IndexedDataset, annotations_of
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.targets import NumericTargets
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

    def only(self, mask: Tensor) -> Rows:
        return Rows(self.features[mask], self.targets[mask], self.index[mask.cpu()])


class PooledTask(DownstreamTask):
    """An encoder, perhaps a bottleneck, and a head; evaluation takes an image's central square.

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
        """What the head reads of images, of shape (B, D)."""
        return self.through_bottleneck(self.encoder.features(images))

    def through_bottleneck(self, features: Tensor) -> Tensor:
        """What the head reads of the encoder's features: (N, encoder's width) to (N, D)."""
        rows: Tensor = self.bottleneck(features)
        return rows

    def predict(self, images: Tensor) -> Tensor:
        return self.of_features(self.neck_features(images))

    def of_features(self, features: Tensor) -> Tensor:
        """What ``predict`` makes of features (B, D), of shape (B, K)."""
        prediction: Tensor = self.head(features)
        return prediction

    @abstractmethod
    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        """Sets the head to the best one on fixed features, float32 (N, D), and targets as of :func:`targets_of`."""

    @abstractmethod
    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Metrics of predictions (N, K) by name; selection goes by the first one, and larger is better."""

    def evaluate(self, source: IndexedDataset, preprocessing: Preprocessing, share: DistInfo) -> dict[str, float]:
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


def check_numbers(
    task: str,
    source: IndexedDataset,
    held_out: IndexedDataset | None,
    fault: Callable[[Tensor], str | None],
    varies: Callable[[Tensor], bool],
    needs: str,
) -> list[str]:
    """What columns of numbers lack, in training and in what is measured on, as sentences.

    ``fault`` says what is wrong with a training column (N,); one column to measure on must vary, or ``needs`` is said.
    """
    problems = []
    for images, where in ((source, "training images"), (held_out, "images to measure on")):
        if images is None:
            continue
        numbers = annotations_of(images, NumericTargets)
        if numbers is None:
            return [
                f"{task} needs numbers beside its images, and {images.name} has none: take data=table, and name their columns by "
                "`data.target_columns`."
            ]
        problems += [
            f"{images.name}: {name!r} has no value in any of the {where}: fill it in, or leave it out."
            for name, column in zip(numbers.names, numbers.values.unbind(1), strict=True)
            if bool(column.isnan().all())
        ]
    numbers, wanted = annotations_of(source, NumericTargets), held_out and annotations_of(held_out, NumericTargets)
    if problems or numbers is None:
        return problems
    faults = {name: fault(column) for name, column in zip(numbers.names, numbers.values.unbind(1), strict=True)}
    problems = [f"{source.name}: {name!r} {text}" for name, text in faults.items() if text is not None]
    if wanted and not any(map(varies, wanted.values.unbind(1))):
        problems.append(f"{source.name}: {needs}")
    return problems


def choose_decay(
    task: PooledTask, decays: Sequence[float], train: Rows, held_out: Rows | None, folds: Tensor | None
) -> float:
    """The weight decay whose head scores best on images that it was not fitted on; the largest of equals.

    Those are the images held out, or the parts of a cross-validation (``folds``, see
    :class:`ssl_pipeline.downstream.labels.LabeledSplit`), whose predictions are scored together. With neither, the first decay.
    """
    if len(decays) == 1 or (held_out is None and folds is None):
        return decays[0]
    scores = dict[float, float]()
    for decay in sorted(decays, reverse=True):
        if held_out is not None:
            predictions, targets = _predictions(task, decay, train, held_out), held_out.targets
        else:
            assert folds is not None
            own = folds.to(train.targets.device)
            parts = [own == part for part in range(int(folds.max()) + 1)]
            predictions = torch.cat([_predictions(task, decay, train.only(~part), train.only(part)) for part in parts])
            targets = torch.cat([train.targets[part] for part in parts])
        scores[decay] = first_metric(task.score(predictions, targets.cpu()))
    return max(scores, key=lambda decay: scores[decay])


@torch.no_grad()
def _predictions(task: PooledTask, decay: float, train: Rows, measured: Rows) -> Tensor:
    task.fit_head(train.features, train.targets, decay)
    return task.of_features(measured.features).float().cpu()


def first_metric(metrics: dict[str, float]) -> float:
    """The one that selection goes by; larger is better, and NaN is the least."""
    value = next(iter(metrics.values()))
    return float("-inf") if math.isnan(value) else value
