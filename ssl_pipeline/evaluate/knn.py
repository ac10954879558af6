"""Weighted k-nearest-neighbour accuracy: how good the features are before anything is trained on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 2**25  # float32 values held at once: 128 MiB


def neighbours(queries: Tensor, bank: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The k most similar rows of a bank by cosine, exactly: every pair is computed, a few queries at a time.

    Args:
        queries: shape (Q, D).
        bank: shape (N, D).
        k: neighbours; all rows if there are fewer.

    Yields:
        For consecutive queries the similarities, float32, and the rows' numbers, int64, both of shape (part, k), the most
        similar first.
    """
    unit = F.normalize(bank.float(), dim=1)
    for part in queries.split(max(1, _SIMILARITIES // max(1, len(bank)))):
        similarity, index = (F.normalize(part.float(), dim=1) @ unit.T).topk(min(k, len(bank)), dim=1)
        yield similarity, index


def knn_predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int = 20, temperature: float = 0.1
) -> Tensor:
    """Votes of the k nearest rows by cosine similarity, weighted by exp(similarity ÷ temperature) (Wu et al. 2018).

    Args:
        queries: shape (Q, D).
        bank: shape (N, D).
        bank_labels: int64 of shape (N,).
        classes: number of classes.
        k: neighbours; all rows if there are fewer.
        temperature: sharpness of the weights.

    Returns:
        Predicted classes, int64 of shape (Q,).
    """
    predictions = []
    for similarity, index in neighbours(queries, bank, k):
        votes = similarity.new_zeros(len(similarity), classes)
        # Less the greatest: a small temperature would overflow, and the ranks of the classes stay.
        votes.scatter_add_(1, bank_labels[index], ((similarity - similarity[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """The share of queries that :func:`knn_predict` gets right."""
    predicted = knn_predict(queries, bank, bank_labels, classes, k, temperature)
    return float((predicted == query_labels).float().mean())
