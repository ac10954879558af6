"""Weighted k-nearest-neighbour accuracy: how good the features are before anything is trained on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    bank = F.normalize(bank.float(), dim=1)
    predictions = []
    for part in F.normalize(queries.float(), dim=1).split(1024):  # the whole Q×N matrix need not exist at once
        similarity, neighbours = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(
    queries: Tensor, query_labels: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int = 20
) -> float:
    """The share of queries that :func:`knn_predict` gets right."""
    predicted = knn_predict(queries, bank, bank_labels, classes, k)
    return float((predicted == query_labels).float().mean())
