"""Memories of embeddings: a queue of the last batches, and a bank with one row a sample. All of their state is saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_pipeline.losses.gather import all_gather_ids, all_gather_rows
from ssl_pipeline.losses.info_nce import normalize_rows


class MemoryQueue(nn.Module):
    """The last ``size`` rows of ``width`` that were pushed, first in, first out (He et al. 2020).

    It starts empty rather than with noise, and a batch that reaches the end continues at the start: no row is lost.
    """

    rows: Tensor
    sample: Tensor
    pushed: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("sample", torch.full((size,), -1))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(self.size, int(self.pushed))

    def keys(self) -> tuple[Tensor, Tensor]:
        """The rows that are there, float32 of shape (n, width), and their samples, int64 of shape (n,)."""
        return self.rows[: len(self)], self.sample[: len(self)]

    @torch.no_grad()
    def push(self, rows: Tensor, sample: Tensor) -> None:
        """Adds the rows (B, width) of all processes, L2-normalized, with their samples, int64 (B,); the oldest are overwritten."""
        rows, sample = all_gather_rows(normalize_rows(rows).to(self.rows.dtype)), all_gather_ids(sample)
        place = (self.pushed + torch.arange(len(rows), device=rows.device)) % self.size
        kept = slice(max(0, len(rows) - self.size), None)
        self.rows[place[kept]], self.sample[place[kept]] = rows[kept], sample[kept]
        self.pushed += len(rows)


class MemoryBank(nn.Module):
    """An exemplar memory: one L2-normalized row of ``width`` a sample (Wu et al. 2018; Zhong et al. 2019)."""

    rows: Tensor

    def __init__(self, samples: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(samples, width))

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Fills it before use with float (samples, width): a row of zeros would count as a candidate of exp 0."""
        self.rows.copy_(normalize_rows(rows.to(self.rows.device)))

    @torch.no_grad()
    def update(self, index: Tensor, rows: Tensor, momentum: float) -> None:
        """``K[i] ← normalize(m·K[i] + (1 − m)·f_i)`` for the samples of all processes; of a repeated one the first counts.

        Args:
            index: int64 of shape (B,), this process's.
            rows: shape (B, width).
            momentum: m.
        """
        index, rows = all_gather_ids(index), all_gather_rows(normalize_rows(rows).to(self.rows.dtype))
        samples, inverse = index.unique(return_inverse=True)
        place = torch.arange(len(index), device=index.device)
        first = torch.full_like(samples, len(index)).scatter_reduce_(0, inverse, place, "amin")
        self.rows[samples] = normalize_rows(momentum * self.rows[samples] + (1 - momentum) * rows[first])
