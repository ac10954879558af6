"""Retrieval and kNN: nothing is trained, an image is answered by the labeled images that look most like it.

    p(y | x) ∝ Σ over the k nearest labeled images n of [yₙ = y] exp(cos(f(x), f(n)) ÷ τ)

When to use: to look at features without training anything, and where classes come and go. The first figure is the kNN
accuracy. Wu et al. 2018, arXiv 1805.01978, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.classification import check_labels
from ssl_pipeline.downstream.vector import PooledConfig, PooledTask
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.head import KNNHead


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
        """The task on top of an encoder."""
        return Retrieval(self, encoder, classes)

    def check(self, source: IndexedDataset, held_out: IndexedDataset | None = None) -> list[str]:
        """Labels must exist."""
        return check_labels("retrieval", source, held_out)

    def check_regime(self, regime: str) -> list[str]:
        """Nothing is trained."""
        if regime != "frozen":
            return [f"retrieval trains nothing, and `regime.name` is {regime}: set regime=frozen."]
        return super().check_regime(regime)

    def strata(self, source: IndexedDataset) -> Tensor | None:
        """The labels."""
        return source.labels


class Retrieval(PooledTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__(config, encoder)
        self.recall_at = config.recall_at
        self.head: KNNHead = KNNHead(self.width, classes, config.k, config.temperature)

    def embed(self, batch: Batch) -> Embeddings:
        """Features of the first view."""
        return {"features": self.neck_features(batch.views[0])}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """There is none: the one regime that is allowed trains nothing."""
        raise AssertionError("retrieval trains nothing")

    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        """Keeps the labeled images' features."""
        del decay
        self.head.remember(features, targets)

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """As many rows as are remembered."""
        rows, labels = state.get("head.rows"), state.get("head.labels")
        if rows is not None and labels is not None:
            self.head.remember(torch.zeros_like(rows), torch.zeros_like(labels))

    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """The share of images whose neighbors' vote is right."""
        return {"knn_accuracy": float((predictions.argmax(1) == targets).float().mean())}

    def evaluate_features(self, features: Tensor, targets: Tensor) -> dict[str, float]:
        """The kNN accuracy, mean average precision, and recall, of images' features against those remembered.

        Of a class that nothing remembered is of, nothing can be found: such images count in the accuracy alone, and
        ``queries_measured`` says how many the other figures are of.
        """
        bank_labels = self.head.labels.cpu()
        precision, first = ranking(features, targets, self.head.rows.cpu(), bank_labels)
        figures, count = super().evaluate_features(features, targets), len(targets)
        answerable = torch.isin(targets, bank_labels)
        precision, first = precision[answerable], first[answerable]
        if len(first):
            figures["mean_average_precision"] = float(precision.mean())
            figures |= {f"recall_at_{k}": float((first < k).float().mean()) for k in self.recall_at}
        return figures | ({} if len(first) == count else {"queries_measured": float(len(first))})


def ranking(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> tuple[Tensor, Tensor]:
    """How well a bank's rows, sorted by cosine similarity, answer each query.

    Args:
        queries: shape (Q, D).
        labels: int64 of shape (Q,).
        bank: shape (N, D).
        bank_labels: int64 of shape (N,).

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
