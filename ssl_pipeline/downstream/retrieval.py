"""Retrieval and kNN: nothing is trained, an image is answered by the labeled images that look most like it.

    p(y | x) ∝ Σ over the k nearest labeled images n of [yₙ = y] exp(cos(f(x), f(n)) ÷ τ)

When to use: to judge features without training anything, and where classes come and go. The first metric is the kNN
accuracy. Wu et al. 2018, arXiv 1805.01978, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.classification import check_labels
from ssl_pipeline.downstream.pooled_task import PooledConfig, PooledTask
from ssl_pipeline.downstream.task import measured
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.metrics.knn import knn_votes, nearest_neighbors
from ssl_pipeline.models.encoder import Encoder


class Config(PooledConfig):
    """Retrieval by cosine similarity of features.

    Attributes:
        k: neighbors that vote (Wu et al. 2018).
        temperature: sharpness of the votes.
        recall_at: an image counts as found when one of so many neighbors is of its class.
    """

    gives = "classes"
    pipeline_tag = "image-feature-extraction"
    selects = False
    k: int = Field(20, ge=1)
    temperature: float = Field(0.1, gt=0)
    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5)

    def build(self, encoder: Encoder, classes: int) -> Retrieval:
        return Retrieval(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        return check_labels("retrieval", source, held_out)

    def check_regime(self, regime: str) -> list[str]:
        if regime != "frozen":
            return [f"retrieval trains nothing, and `regime.name` is {regime}: set regime=frozen."]
        return super().check_regime(regime)

    def strata(self, source: IndexedDataset) -> Tensor | None:
        return source.labels


class KNNHead(nn.Module):
    """Votes of the k nearest labeled rows (or all), weighted by exp(cosine ÷ temperature) (Wu et al. 2018); no parameters."""

    rows: Tensor
    labels: Tensor

    def __init__(self, in_width: int, classes: int, k: int, temperature: float) -> None:
        super().__init__()
        self.classes, self.k, self.temperature = classes, k, temperature
        self.register_buffer("rows", torch.zeros(1, in_width))
        self.register_buffer("labels", torch.zeros(1, dtype=torch.int64))

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Keeps rows, (N, in_width), and their labels, int64 of shape (N,)."""
        self.rows, self.labels = F.normalize(features, dim=1), labels

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_width) to the logarithm of the classes' shares of the votes, (B, classes)."""
        queries = F.normalize(features.float(), dim=1)
        found = [knn_votes(*near, self.labels, self.classes, self.temperature)
                 for near in nearest_neighbors(queries, self.rows, self.k, normalize=False)]  # fmt: skip
        votes = torch.cat(found)
        return (votes / votes.sum(1, keepdim=True)).clamp_min(torch.finfo(votes.dtype).tiny).log()


class Retrieval(PooledTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__(config, encoder)
        self.recall_at = config.recall_at
        self.head: KNNHead = KNNHead(self.width, classes, config.k, config.temperature)

    def embed(self, batch: Batch) -> Embeddings:
        return {"features": self.neck_features(batch.views[0])}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        raise AssertionError("retrieval trains nothing")

    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        self.head.remember(features, targets)

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        rows, labels = state.get("head.rows"), state.get("head.labels")
        if rows is not None and labels is not None:
            self.head.remember(torch.zeros_like(rows), torch.zeros_like(labels))

    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        return {"knn_accuracy": float((predictions.argmax(1) == targets).float().mean())}

    def evaluate_features(self, features: Tensor, targets: Tensor) -> dict[str, float]:
        """The kNN accuracy, mean average precision, and recall, of images' features against those remembered.

        Images of a class that the bank lacks count in the accuracy alone, and ``queries_measured`` says how many the others are of.
        """
        bank_labels = self.head.labels.cpu()
        precision, first = ranking(features, targets, self.head.rows.cpu(), bank_labels)
        metrics = super().evaluate_features(features, targets)
        answerable = torch.isin(targets, bank_labels)
        precision, first = precision[answerable], first[answerable]
        if len(first):
            metrics["mean_average_precision"] = float(precision.mean())
            metrics |= {f"recall_at_{k}": float((first < k).float().mean()) for k in self.recall_at}
        return metrics | measured("queries", len(first), len(targets))


def ranking(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> tuple[Tensor, Tensor]:
    """How well a bank's rows (N, D), sorted by cosine similarity, answer queries (Q, D).

    Returns:
        Average precision, shape (Q,), 0 where the bank has no row of the class; and the place of the first row of the query's
        class, int64 of shape (Q,), N where there is none.
    """
    places = torch.arange(1, len(bank) + 1)
    precisions, firsts = [], []
    for query, label in zip(F.normalize(queries, dim=1).split(256), labels.split(256), strict=True):
        order = (query @ F.normalize(bank, dim=1).T).argsort(dim=1, descending=True, stable=True)
        right = bank_labels[order] == label[:, None]
        count = right.sum(1)
        precision = (right * right.cumsum(1) / places).sum(1) / count.clamp_min(1)
        precisions.append(precision)
        firsts.append(torch.where(count > 0, right.int().argmax(1), len(bank)))
    return torch.cat(precisions), torch.cat(firsts)
