"""Regression: one or several numbers for an image.

    ℓ = mean over the known values of ( (y − mean) ÷ std − [W f(x) + b] )²

with mean and std of the training values.

When to use: the answer is an amount. Where the place or size of the object is the answer, let stage two's views
neither crop nor mirror. The first metric is R².
"""

from __future__ import annotations

from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.pooled_task import PooledConfig, PooledTask, check_numbers, targets_of
from ssl_pipeline.downstream.task import measured
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.metrics.linear_probe import fit_ridge, known_mean
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.heads import LinearHead


class Config(PooledConfig):
    """Regression of numbers, each standardized by its training values; one that is not known counts for nothing.

    Attributes:
        loss: ``squared``, or ``huber`` (linear beyond one standard deviation), which outliers move less; the solved probe is
            least squares.
    """

    in_percent = False
    gives = "values"
    loss: Literal["squared", "huber"] = "squared"

    def build(self, encoder: Encoder, classes: int) -> Regression:
        return Regression(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        def fault(column: Tensor) -> str | None:
            value = float(column[~column.isnan()][0])
            return None if _varies(column) else f"is {value:g} in every training image: leave the column out."

        needs = "each value is the same in all images to measure on, and R² needs different ones: add images."
        return check_numbers("regression", source, held_out, fault, _varies, needs)


class Regression(PooledTask):
    """See :class:`Config`. The head predicts standardized values, ``predict`` the values themselves."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, encoder: Encoder, values: int) -> None:
        super().__init__(config, encoder)
        self.head: LinearHead = LinearHead(self.width, values)
        self.loss = {"squared": F.mse_loss, "huber": F.smooth_l1_loss}[config.loss]
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("std", torch.ones(values))

    def look_at(self, train: IndexedDataset) -> None:
        values = targets_of(train)
        mean = values.nanmean(0)
        self.mean.copy_(mean)
        self.std.copy_((values - mean).square().nanmean(0).sqrt().clamp_min(1e-6))

    def embed(self, batch: Batch) -> Embeddings:
        return {"standardized": self.head(self.neck_features(batch.views[0]))}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        targets = (batch.target - self.mean) / self.std
        return StepOutput(known_mean(self.loss, embeddings["standardized"].float(), targets).mean())

    def of_features(self, features: Tensor) -> Tensor:
        return super().of_features(features).float() * self.std + self.mean

    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        self.head.assign(*fit_ridge(features, (targets - self.mean) / self.std, decay))

    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """R² (1 is perfect, 0 is predicting the mean), and the absolute error in the values' own units; means over the values.

        A value that is the same in all images has no R²: it is left out of that mean, and ``values_measured`` says how many
        are in it. A value that is known of no image is in neither.
        """
        r2, absolute = [], []
        for predicted, value in zip(predictions.double().unbind(1), targets.double().unbind(1), strict=True):
            known = ~value.isnan()
            if not bool(known.any()):
                continue
            error, spread = (value - predicted)[known], (value - value[known].mean())[known]
            absolute.append(float(error.abs().mean()))
            if _varies(value):
                r2.append(float(1 - error.square().sum() / spread.square().sum()))
        metrics = {"r2": fmean(r2)} if r2 else {}
        metrics |= {"mean_absolute_error": fmean(absolute)} if absolute else {}
        return metrics | measured("values", len(r2), targets.shape[1])


def _varies(column: Tensor) -> bool:
    """Whether a column (N,) has two known values that differ."""
    known = column[~column.isnan()]
    return len(known) > 1 and bool((known != known[0]).any())
