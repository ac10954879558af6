"""The batch across processes: a gather whose backward sums the gradients of all processes.

With the mean over local rows as loss and DistributedDataParallel's mean over processes, loss and gradient then equal
those of one process that holds the whole batch. Taking only one's own slice of the gradient, the common shortcut, does
not point in the same direction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        _, processes = rank_and_world_size()
        parts = [torch.empty_like(rows) for _ in range(processes)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rank, processes = rank_and_world_size()
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(processes)[rank]


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows of all processes in the order of their ranks; differentiable.

    Args:
        rows: shape (N, D), the same on every process.

    Returns:
        Shape (processes × N, D); ``rows`` itself in a group of one.
    """
    if rank_and_world_size()[1] == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def all_gather_ids(ids: Tensor) -> Tensor:
    """The ids of all processes' rows, in the order of :func:`all_gather_rows`; ``ids`` itself in a group of one.

    Args:
        ids: int64 of shape (N,), N the same on every process.
    """
    _, processes = rank_and_world_size()
    if processes == 1:
        return ids
    parts = [torch.empty_like(ids) for _ in range(processes)]
    dist.all_gather(parts, ids.contiguous())
    return torch.cat(parts)
