"""Weighted k-nearest-neighbor accuracy: how good the features are before anything is trained on them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 2**25  # float32 values held at once: 128 MiB
_BLOCK = 64


def nearest_neighbors(queries: Tensor, bank: Tensor, k: int, normalize: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """The k most similar rows (or all) of a bank (N, D) for queries (Q, D) by cosine: every pair is computed, a few queries at a time.

    Yields:
        For consecutive queries the similarities, float32, and the rows' numbers, int64, both of shape (part, k), the most
        similar first.
    """
    unit = F.normalize(bank.float(), dim=1) if normalize else bank
    for part in queries.split(max(1, _SIMILARITIES // max(1, len(bank)))):
        rows = F.normalize(part.float(), dim=1) if normalize else part
        yield _greatest(rows @ unit.T, min(k, len(bank)))


def _greatest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of each row and their places; exact, and twice as fast as ``topk`` for a small k.

    No value of a block is among the k greatest unless the block's own greatest is among the k greatest of the blocks.
    """
    count = similarity.shape[1]
    if 8 * k * _BLOCK > count:
        value, index = similarity.topk(k, dim=1)
        return value, index
    whole, device = count // _BLOCK * _BLOCK, similarity.device
    best = similarity[:, :whole].unflatten(1, (-1, _BLOCK)).amax(2).topk(k, dim=1, sorted=False).indices
    inside = (best[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=device)).flatten(1)
    rest = torch.arange(whole, count, device=device).expand(len(similarity), -1)
    looked_at = torch.cat([inside, rest], 1)
    value, place = similarity.gather(1, looked_at).topk(k, dim=1)
    return value, looked_at.gather(1, place)


def knn_predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int = 20, temperature: float = 0.1
) -> Tensor:
    """Classes (Q,) by votes of the k nearest rows by cosine similarity, weighted by exp(similarity ÷ temperature) (Wu et al. 2018).

    A row of the bank (N, D) of label −1 has no vote.

    Raises:
        ValueError: no row of the bank has a label.
    """
    voting = bank_labels >= 0
    bank, bank_labels = bank[voting], bank_labels[voting]
    if not len(bank):
        raise ValueError("kNN needs at least one row with a label in its bank.")
    near = nearest_neighbors(queries, bank, k)
    return torch.cat([knn_votes(*found, bank_labels, classes, temperature).argmax(1) for found in near])


def knn_votes(similarity: Tensor, index: Tensor, bank_labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Each class's sum of exp((similarity − the greatest) ÷ temperature) over the neighbors: (N, classes); no small τ overflows."""
    votes = similarity.new_zeros(len(similarity), classes)
    return votes.scatter_add_(1, bank_labels[index], ((similarity - similarity[:, :1]) / temperature).exp())


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """The share of labeled queries that :func:`knn_predict` gets right; a query of label −1 is not counted.

    NaN where nothing can be measured: no query or no row of the bank has a label, or a feature is not finite.
    """
    known = query_labels >= 0
    measurable = bool(known.any()) and bool((bank_labels >= 0).any())
    if not measurable or not (queries.isfinite().all() and bank.isfinite().all()):
        return math.nan
    predicted = knn_predict(queries[known], bank, bank_labels, classes, k, temperature)
    return float((predicted == query_labels[known]).float().mean())
