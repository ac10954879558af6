"""The batch across processes: a gather whose backward sums the gradients of all processes.

With the mean over local rows as loss and DistributedDataParallel's mean over processes, loss and gradient equal those of
one process that holds the whole batch. The common shortcut, one's own slice of the gradient, points in another direction.
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
        return all_gather_ids(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rank, processes = rank_and_world_size()
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(processes)[rank]


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, D), N the same on every process, of all processes: (processes × N, D) in the order of ranks; differentiable."""
    if rank_and_world_size()[1] == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def all_gather_ids(ids: Tensor) -> Tensor:
    """Ids (N,), N the same on every process, of all processes' rows, in the order of :func:`all_gather_rows`."""
    _, processes = rank_and_world_size()
    if processes == 1:
        return ids
    parts = [torch.empty_like(ids) for _ in range(processes)]
    dist.all_gather(parts, ids.contiguous())
    return torch.cat(parts)


def mean_count(counted: Tensor) -> Tensor:
    """What to divide a process's sum by, so that the mean over processes is that over all counted rows; bool (N,) to a scalar > 0."""
    count, processes = counted.sum().float(), rank_and_world_size()[1]
    if processes > 1:
        dist.all_reduce(count)
    return count.clamp_min(1) / processes
