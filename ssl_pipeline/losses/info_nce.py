"""InfoNCE: the temperature-scaled contrastive loss (van den Oord et al. 2018; NT-Xent in Chen et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.losses.gather import gather_rows, world


def unit_rows(rows: Tensor) -> Tensor:
    """L2-normalised rows in fp32 at least; a zero row stays zero, with gradient zero rather than one of 1e12.

    Args:
        rows: shape (N, D), any floating type.

    Returns:
        Shape (N, D), fp32 (fp64 for fp64).
    """
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = torch.linalg.vector_norm(precise, dim=1, keepdim=True)
    return precise / torch.where(norm > torch.finfo(precise.dtype).tiny ** 0.5, norm, torch.inf)


def info_nce(queries: Tensor, keys: Tensor, positive: Tensor, temperature: float, own: Tensor | None = None) -> Tensor:
    r"""The mean over the rows of :math:`-\log p(\text{positive} \mid \text{query})`.

    .. math:: p(j \mid i) = \frac{\exp(\bar q_i^\top \bar k_j / \tau)}{\sum_{l \ne \text{own}_i} \exp(\bar q_i^\top \bar k_l / \tau)}

    where a bar is L2 normalisation. Computed in fp32 at least, whatever the input's type: half precision overflows at
    small temperatures.

    Args:
        queries: shape (N, D).
        keys: shape (M, D).
        positive: the row of ``keys`` that belongs to each query, int64 of shape (N,).
        temperature: :math:`\tau > 0`; small sharpens, large smooths.
        own: the row of ``keys`` that is the query itself and no candidate, int64 of shape (N,).

    Returns:
        A scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature of InfoNCE must be above 0, got {temperature}.")
    with torch.autocast(queries.device.type, enabled=False):
        logits = unit_rows(queries) @ unit_rows(keys).T / temperature
        if own is not None:
            logits = logits.scatter(1, own[:, None], float("-inf"))
        return F.cross_entropy(logits, positive)


def two_view_info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE between two views of a batch, both ways, against all rows of all processes.

    Args:
        first: shape (B, D), this process's share of the batch.
        second: shape (B, D), the other view of the same samples.
        temperature: above 0.

    Returns:
        The mean over this process's 2·B rows.
    """
    rank, _ = world()
    rows = torch.cat([first, second])
    count = len(rows)
    local = torch.arange(count, device=rows.device)
    offset = rank * count
    return info_nce(rows, gather_rows(rows), offset + (local + count // 2) % count, temperature, own=offset + local)
