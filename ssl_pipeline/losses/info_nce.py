"""InfoNCE: the temperature-scaled contrastive loss (van den Oord et al. 2018; NT-Xent in Chen et al. 2020).

One primitive serves every contrastive task. It is exact, and its logits exist only a tile at a time: memory grows with the
number of rows, not with its square. Which key is a positive, which is no candidate, and which temperature holds between two
rows follow from ids, one integer a row: a mask of queries × keys is never made.

Forward keeps, for every query, the logarithm of the sum of exponentials over its negatives and over its positives, and nothing
else. Backward computes each tile ``s`` again and turns it into weights ``∂loss/∂s`` in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_pipeline.losses.gather import all_gather_ids, all_gather_rows, mean_count, rank_and_world_size

Match = tuple[
    Tensor, Tensor
]  # ids of the queries (N,) and of the keys (M,), int64: where they are equal, the two match
# Rows and columns of a tile: it should stay in a core's cache, and be worth a kernel's start on a GPU.
_SIDE = {"cpu": 1024, "cuda": 8192}


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

    Computed in fp32 at least, whatever the input's type: half precision overflows at small temperatures.

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
        other_domain: the temperature for keys of other domains, one for all or of shape (N,).
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
        tiles = _Tiles(unit_queries, unit_keys, scale, other_scale, positive, own, left_out, domain)
        losses: Tensor
        losses, counted = _TiledInfoNCE.apply(unit_queries, unit_keys, scale, other_scale, tiles, decoupled)
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
        temperature: of all rows.
        sample: int64 of shape (B,): rows of equal ids are positives. The place in the global batch by default.
        left_out: int64 of shape (B,) each: rows of equal ids that are no positives are no negatives either.
        domain: int64 of shape (B,), with ``other_domain``.
        other_domain: the temperature between rows of different domains.
        decoupled: take the positives out of the denominator.

    Returns:
        A scalar: the mean over the 2·B rows of each process.
    """
    rank, _ = rank_and_world_size()
    rows = torch.cat([first, second])
    place = torch.arange(len(rows), device=rows.device) + rank * len(rows)
    if sample is None:
        sample = torch.arange(len(first), device=rows.device) + rank * len(first)

    def of_both(ids: Tensor) -> Match:
        ids = torch.cat([ids, ids])
        return ids, all_gather_ids(ids)

    own = place, all_gather_ids(place)
    return info_nce(
        rows, all_gather_rows(rows), of_both(sample), temperature, own, [of_both(ids) for ids in left_out],
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


class _Pairs:
    """The matching pairs of a tile, found by sorting instead of a mask; ``edges`` are the tiles' first columns, and the end."""

    def __init__(self, match: Match, edges: list[int]) -> None:
        self._queries = match[0]
        self._chunks = [match[1][a:b].sort() for a, b in itertools.pairwise(edges)]

    def of(self, low: int, high: int, chunk: int) -> tuple[Tensor, Tensor]:
        """Rows and columns within the tile of queries [low, high) and one chunk of keys."""
        ids, order = self._chunks[chunk]
        wanted = self._queries[low:high]
        first = torch.searchsorted(ids, wanted)
        count = torch.searchsorted(ids, wanted, right=True) - first
        rows = torch.arange(high - low, device=ids.device).repeat_interleave(count)
        # Each row's matches are consecutive in the sorted ids.
        before = (count.cumsum(0) - count)[rows]
        place = torch.arange(len(rows), device=ids.device) - before + first[rows]
        return rows, order[place]


class _LogSum:
    """The logarithm of a sum of exponentials per row, gathered piece by piece around a running maximum."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._most = like.new_full((rows,), torch.finfo(like.dtype).min)
        self._sum = like.new_zeros(rows)

    def _rise(self, part: slice, candidate: Tensor) -> Tensor:
        before = self._most[part].clone()
        most = torch.maximum(before, candidate, out=self._most[part])
        self._sum[part] *= (before - most).exp_()
        return most

    def add(self, part: slice, tile: Tensor, dim: int, scratch: Tensor) -> None:
        """The exponentials of a tile, summed over a dimension into rows ``part``."""
        most = self._rise(part, tile.amax(dim))
        self._sum[part] += torch.sub(tile, most.unsqueeze(dim), out=scratch).exp_().sum(dim)

    def add_at(self, rows: Tensor, values: Tensor) -> None:
        lowest = torch.full_like(self._most, torch.finfo(values.dtype).min)
        most = self._rise(slice(None), lowest.scatter_reduce_(0, rows, values, "amax"))
        self._sum.index_add_(0, rows, (values - most[rows]).exp_())

    def value(self) -> Tensor:
        return self._most + self._sum.log()  # -∞ for rows to which nothing was added


@dataclass
class _Tile:
    """A tile whose logits of all but negatives are -∞, and its positives apart; ``scratch`` is a second one to compute in."""

    rows: slice
    columns: slice
    logits: Tensor
    scratch: Tensor
    positive_rows: Tensor
    positive_columns: Tensor
    positive_logits: Tensor
    same_domain: Tensor | None
    mirrored: bool


class _Tiles:
    """The logits tile by tile, in memory that is allocated once.

    The scales are 1 ÷ τ per query, the other one towards keys of other domains; the rest is as in :func:`info_nce`, with unit rows.
    """

    @torch.no_grad()
    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        other_scale: Tensor | None,
        positive: Match,
        own: Match | None,
        left_out: Sequence[Match],
        domain: Match | None,
    ) -> None:
        side = _SIDE[queries.device.type if queries.device.type in _SIDE else "cuda"]
        self.queries, self.keys = queries.detach(), keys.detach()
        self.scale, self.other_scale = scale.detach(), None if other_scale is None else other_scale.detach()
        self._own, self._domain = own, domain
        matches = [positive, *([] if own is None else [own]), *left_out]
        uniform = scale.stride(0) == 0 and other_scale is None
        # In-batch logits are symmetric: the tile (J, I) is the tile (I, J) mirrored.
        self.symmetric = keys is queries and uniform and all(of_queries is of_keys for of_queries, of_keys in matches)
        self._rows = [*range(0, len(queries), side), len(queries)]
        self._columns = [*range(0, len(keys), side), len(keys)]
        self._positive, *self._masked = [_Pairs(match, self._columns) for match in matches]
        self._memory = queries.new_empty(2, side * side)
        self._scaled = queries * scale[:, None] if other_scale is None else self.queries

    def __iter__(self) -> Iterator[_Tile]:
        for i, (low, high) in enumerate(itertools.pairwise(self._rows)):
            for j, (left, right) in enumerate(itertools.pairwise(self._columns)):
                if not self.symmetric or i <= j:
                    yield self._tile(slice(low, high), slice(left, right), j, mirrored=self.symmetric and i < j)

    def _tile(self, rows: slice, columns: slice, chunk: int, mirrored: bool) -> _Tile:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        logits, scratch = self._memory[:, : height * width].view(2, height, width)
        torch.mm(self._scaled[rows], self.keys[columns].T, out=logits)
        same_domain = None
        if self._domain is not None and self.other_scale is not None:
            same_domain = self._domain[0][rows, None] == self._domain[1][None, columns]
            logits *= torch.where(same_domain, self.scale[rows, None], self.other_scale[rows, None])
        at_rows, at_columns = self._positive.of(rows.start, rows.stop, chunk)
        if self._own is not None:
            others = self._own[0][rows][at_rows] != self._own[1][columns][at_columns]
            at_rows, at_columns = at_rows[others], at_columns[others]
        at_logits = logits[at_rows, at_columns]
        logits[at_rows, at_columns] = -torch.inf
        for pairs in self._masked:
            logits[pairs.of(rows.start, rows.stop, chunk)] = -torch.inf
        return _Tile(rows, columns, logits, scratch, at_rows, at_columns, at_logits, same_domain, mirrored)


class _TiledInfoNCE(torch.autograd.Function):
    """The loss of every query, shape (N,), 0 where it does not count; and whether it counts, bool of shape (N,)."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, other: Tensor | None, tiles: _Tiles, decoupled: bool
    ) -> tuple[Tensor, Tensor]:
        count, total = queries.new_zeros(len(queries)), queries.new_zeros(len(queries))
        negatives, positives = _LogSum(len(queries), queries), _LogSum(len(queries), queries)
        for tile in tiles:
            negatives.add(tile.rows, tile.logits, 1, tile.scratch)
            places = [tile.positive_rows + tile.rows.start]
            if tile.mirrored:
                negatives.add(tile.columns, tile.logits, 0, tile.scratch)
                places.append(tile.positive_columns + tile.columns.start)
            for place in places if len(tile.positive_rows) else []:
                positives.add_at(place, tile.positive_logits)
                count.index_add_(0, place, torch.ones_like(tile.positive_logits))
                total.index_add_(0, place, tile.positive_logits)
        negative, own_positive, mean = negatives.value(), positives.value(), total / count
        counted = count > 0 if not decoupled else (count > 0) & torch.isfinite(negative)
        # log(1 + negatives ÷ positives) keeps its digits where p → 1.
        softplus = torch.logaddexp(torch.zeros_like(negative), negative - own_positive)
        losses = negative - mean if decoupled else softplus + (own_positive - mean)
        ctx.save_for_backward(negative, own_positive, count, counted)
        ctx.tiles, ctx.decoupled = tiles, decoupled
        ctx.mark_non_differentiable(counted)
        return torch.where(counted, losses, 0.0), counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        negative, positive, count, counted = saved
        tiles: _Tiles = ctx.tiles
        share = torch.where(counted, gradients[0], 0.0)
        whole = torch.where(counted, negative if ctx.decoupled else torch.logaddexp(negative, positive), 0.0)
        # ∂loss/∂s of a positive is p - 1/|P| = (r - 1/|P|) - r·π: r its softmax among the positives, π the negatives' share.
        # Written so, a single positive has -π exactly, where p - 1 would have lost the digits.
        missing = torch.ones_like(whole) if ctx.decoupled else (negative - whole).exp()
        for_queries = torch.zeros_like(tiles.queries)
        for_keys = torch.zeros_like(tiles.keys) if ctx.needs_input_grad[1] and not tiles.symmetric else None
        for_other = torch.zeros_like(tiles.queries) if tiles.other_scale is not None else None

        def positive_weights(place: Tensor, logits: Tensor) -> Tensor:
            own_share = share[place]
            if ctx.decoupled:
                return -own_share / count[place]
            among = (logits - positive[place]).exp_()
            return own_share * ((among - 1 / count[place]) - among * missing[place])

        for tile in tiles:
            weights = torch.sub(tile.logits, whole[tile.rows, None], out=tile.scratch)
            weights.exp_().mul_(share[tile.rows, None])
            at = tile.positive_rows, tile.positive_columns
            weights[at] = positive_weights(tile.positive_rows + tile.rows.start, tile.positive_logits)
            if tile.mirrored:
                tile.logits.sub_(whole[tile.columns]).exp_().mul_(share[tile.columns])
                tile.logits[at] = positive_weights(tile.positive_columns + tile.columns.start, tile.positive_logits)
                weights += tile.logits
                for_queries[tile.columns].addmm_(weights.T, tiles.queries[tile.rows])
            elif tiles.symmetric:
                weights += weights.T.clone()
            if tile.same_domain is not None and for_other is not None and tiles.other_scale is not None:
                others = weights.masked_fill(tile.same_domain, 0.0)
                weights.masked_fill_(~tile.same_domain, 0.0)
                for_other[tile.rows].addmm_(others, tiles.keys[tile.columns])
                if for_keys is not None:
                    scaled = tiles.other_scale[tile.rows, None] * tiles.queries[tile.rows]
                    for_keys[tile.columns].addmm_(others.T, scaled)
            for_queries[tile.rows].addmm_(weights, tiles.keys[tile.columns])
            if for_keys is not None:
                for_keys[tile.columns].addmm_(weights.T, tiles.scale[tile.rows, None] * tiles.queries[tile.rows])
        # A logit is scale · (query · key): what weighs the keys for the query's gradient weighs the scale's, too.
        halves = 0.5 if tiles.symmetric else 1.0
        for_scale = halves * (for_queries * tiles.queries).sum(1)
        for_queries *= tiles.scale[:, None]
        if for_other is None or tiles.other_scale is None:
            return for_queries, for_keys, for_scale, None, None, None
        for_queries += for_other * tiles.other_scale[:, None]
        return for_queries, for_keys, for_scale, (for_other * tiles.queries).sum(1), None, None
