"""InfoNCE: the temperature-scaled contrastive loss (van den Oord et al. 2018; NT-Xent in Chen et al. 2020).

One primitive serves every contrastive task. It is exact, and its logits exist only a tile at a time: memory grows with the
number of rows, not with its square. Which key is a positive, which is no candidate, and which temperature holds between two
rows follow from ids, one integer a row: a mask of queries × keys is never made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_pipeline.losses.gather import all_gather_ids, all_gather_rows, rank_and_world_size
from ssl_pipeline.losses.tiles import Match, TiledInfoNCE


def to_float32(rows: Tensor) -> Tensor:
    """The rows in fp32 at least: half precision is for the network, not for a loss."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def normalize_rows(rows: Tensor) -> Tensor:
    """Rows (N, D), L2-normalized in fp32 at least; a zero row stays zero, with gradient zero rather than one of 1e12."""
    rows = to_float32(rows)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > torch.finfo(rows.dtype).tiny ** 0.5, norm, torch.inf)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    positive: Match,
    temperature: float | Tensor,
    own: Match | None = None,
    left_out: Sequence[Match] = (),
    domain: Match | None = None,
    other_domain: float | Tensor | None = None,
    decoupled: bool = False,
) -> Tensor:
    r"""The mean over the queries of :math:`-\log p(\text{positive} \mid \text{query})`.

    .. math:: p(j \mid i) = \frac{\exp(\bar q_i^\top \bar k_j / \tau)}{\sum_{l \in C(i)} \exp(\bar q_i^\top \bar k_l / \tau)}

    where a bar is L2 normalization and :math:`C(i)` are the candidates: all keys but ``own`` and those ``left_out``. Several
    positives of a query each count as a target, and their mean is taken (the form called *out* by Khosla et al. 2020). A
    query without any positive (or, decoupled, without any negative) does not count. The mean runs over the queries of all
    processes, scaled so that the mean over processes (DistributedDataParallel's) of the loss and of its gradient are those
    of one process that holds all queries.

    A *match* is a pair of int64 id tensors, of shapes (N,) for the queries and (M,) for the keys: where the ids are equal,
    query and key match. Computed in fp32 at least, whatever the input's type: half precision overflows at small temperatures.

    Args:
        queries: shape (N, D), this process's.
        keys: shape (M, D): the batch's rows, a queue, a memory, or several of them one after another. If it is the very
            tensor ``queries`` (and so are the ids), half of the products are saved.
        positive: which keys are a query's positives.
        temperature: :math:`\tau > 0`, one for all or of shape (N,); gradients reach it if it is a tensor. Small sharpens,
            large smooths.
        own: which key is the query itself: neither positive nor negative.
        left_out: each match takes keys that are no positives out of the candidates: known false negatives.
        domain: which keys are of the query's own domain; with ``other_domain`` given.
        other_domain: the temperature, likewise, towards keys of other domains.
        decoupled: take the positives out of the denominator (DCL, Yeh et al. 2022); the loss can then be negative.

    Returns:
        A scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a temperature is not above 0, or only one of ``domain`` and ``other_domain`` is given.
    """
    if (domain is None) != (other_domain is None):
        raise ValueError("a temperature per domain needs both the ids (`domain`) and the temperature (`other_domain`).")
    with torch.autocast(queries.device.type, enabled=False):
        same = keys is queries
        unit_queries = normalize_rows(queries)
        unit_keys = unit_queries if same else normalize_rows(keys)
        scale = _inverse(temperature, unit_queries)
        other_scale = None if other_domain is None else _inverse(other_domain, unit_queries)
        losses: Tensor
        losses, counted = TiledInfoNCE.apply(
            unit_queries, unit_keys, scale, other_scale, positive, own, tuple(left_out), domain, decoupled,
        )  # fmt: skip
        return losses.sum() / mean_count(counted).to(losses.dtype)


def two_view_info_nce(
    first: Tensor,
    second: Tensor,
    temperature: float | Tensor,
    sample: Tensor | None = None,
    left_out: Sequence[Tensor] = (),
    domain: Tensor | None = None,
    other_domain: float | Tensor | None = None,
    decoupled: bool = False,
) -> Tensor:
    """InfoNCE between two views of a batch, both ways, against all rows of all processes.

    Args:
        first: shape (B, D), this process's share of the batch.
        second: shape (B, D), the other view of the same samples.
        temperature: as the rest, see :func:`info_nce`.
        sample: int64 of shape (B,): rows of equal ids are positives. The place in the global batch by default.
        left_out: int64 of shape (B,) each: rows of equal ids that are no positives are no negatives either.
        domain: int64 of shape (B,), with ``other_domain``.
        other_domain: the temperature between rows of different domains.
        decoupled: see :func:`info_nce`.

    Returns:
        A scalar: the mean over the 2·B rows of each process.
    """
    rank, _ = rank_and_world_size()
    rows = torch.cat([first, second])
    place = torch.arange(len(rows), device=rows.device) + rank * len(rows)
    if sample is None:
        sample = torch.arange(len(first), device=rows.device) + rank * len(first)

    def match(ids: Tensor) -> Match:
        return ids, all_gather_ids(ids)

    def of_both(ids: Tensor) -> Match:
        return match(torch.cat([ids, ids]))

    return info_nce(
        rows, all_gather_rows(rows), of_both(sample), temperature, match(place), [of_both(ids) for ids in left_out],
        None if domain is None else of_both(domain), other_domain, decoupled,
    )  # fmt: skip


def _inverse(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """1 ÷ τ of every row."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"the temperature of InfoNCE must be above 0, got {temperature}.")
    tau = torch.as_tensor(temperature, dtype=rows.dtype, device=rows.device)
    if tau.ndim and not bool((tau > 0).all()):
        raise ValueError(f"every temperature of InfoNCE must be above 0, the least is {float(tau.min())}.")
    return (1 / tau).expand(len(rows))


def mean_count(counted: Tensor) -> Tensor:
    """What to divide a process's sum by, so that the mean over processes is that over all counted rows; bool (N,) to a scalar > 0."""
    count, processes = counted.sum().float(), rank_and_world_size()[1]
    if processes > 1:
        dist.all_reduce(count)
    return count.clamp_min(1) / processes
