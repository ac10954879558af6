"""InfoNCE's forward and backward over tiles of the logits.

Let ``s`` be a tile of logits. Forward keeps, for every query, the logarithm of the sum of exponentials over its negatives and
over its positives, and nothing else. Backward computes each tile again and turns it into weights ``∂loss/∂s`` in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Match = tuple[Tensor, Tensor]
"""Ids of the queries (N,) and of the keys (M,), int64: equal ids match."""

_SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a tile: it should stay in a core's cache, and be worth a kernel's start on a GPU."""


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
        """Single values, each into its row."""
        everything = slice(None)
        lowest = torch.full_like(self._most, torch.finfo(values.dtype).min)
        most = self._rise(everything, lowest.scatter_reduce_(0, rows, values, "amax"))
        self._sum.index_add_(0, rows, (values - most[rows]).exp_())

    def value(self) -> Tensor:
        """-∞ for rows to which nothing was added."""
        return self._most + self._sum.log()


@dataclass
class _Tile:
    """A tile whose logits of all but negatives are -∞, and its positives apart."""

    rows: slice
    columns: slice
    logits: Tensor
    positive_rows: Tensor
    positive_columns: Tensor
    positive_logits: Tensor
    same_domain: Tensor | None
    mirrored: bool


class _Tiles:
    """Computes the logits tile by tile; ``scale`` and ``other_scale`` are 1 ÷ τ per query, towards keys of other domains too.

    The rest is as in :func:`ssl_pipeline.losses.info_nce.info_nce`, with unit rows.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        other_scale: Tensor | None,
        positive: Match,
        own: Match | None,
        left_out: tuple[Match, ...],
        domain: Match | None,
    ) -> None:
        side = _SIDE[queries.device.type if queries.device.type in _SIDE else "cuda"]
        self.queries, self.keys, self.scale, self.other_scale = queries, keys, scale, other_scale
        self._own, self._domain = own, domain
        matches = [positive, *([] if own is None else [own]), *left_out]
        uniform = scale.stride(0) == 0 and other_scale is None
        # In-batch logits are symmetric: the tile (J, I) is the tile (I, J) mirrored.
        self.symmetric = keys is queries and uniform and all(of_queries is of_keys for of_queries, of_keys in matches)
        self._rows = [*range(0, len(queries), side), len(queries)]
        self._columns = [*range(0, len(keys), side), len(keys)]
        self._positive, *self._masked = [_Pairs(match, self._columns) for match in matches]
        self._logits, self.scratch = (queries.new_empty(side * side) for _ in range(2))
        self._scaled = queries * scale[:, None] if other_scale is None else queries

    def __iter__(self) -> Iterator[_Tile]:
        for i, (low, high) in enumerate(itertools.pairwise(self._rows)):
            for j, (left, right) in enumerate(itertools.pairwise(self._columns)):
                if not self.symmetric or i <= j:
                    yield self._tile(slice(low, high), slice(left, right), j, mirrored=self.symmetric and i < j)

    def workspace(self, rows: slice, columns: slice) -> Tensor:
        """A second tile to compute in, of memory that is allocated once."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return self.scratch[: height * width].view(height, width)

    def _tile(self, rows: slice, columns: slice, chunk: int, mirrored: bool) -> _Tile:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        logits = self._logits[: height * width].view(height, width)
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
        return _Tile(rows, columns, logits, at_rows, at_columns, at_logits, same_domain, mirrored)


class TiledInfoNCE(torch.autograd.Function):
    """The loss of every query, and whether it counts; see :func:`ssl_pipeline.losses.info_nce.info_nce`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        other_scale: Tensor | None,
        positive: Match,
        own: Match | None,
        left_out: tuple[Match, ...],
        domain: Match | None,
        decoupled: bool,
    ) -> tuple[Tensor, Tensor]:
        """Args and returns: losses of shape (N,), 0 where a query does not count; bool of shape (N,)."""
        tiles = _Tiles(queries, keys, scale, other_scale, positive, own, left_out, domain)
        count, total = queries.new_zeros(len(queries)), queries.new_zeros(len(queries))
        negatives, positives = _LogSum(len(queries), queries), _LogSum(len(queries), queries)
        for tile in tiles:
            scratch = tiles.workspace(tile.rows, tile.columns)
            negatives.add(tile.rows, tile.logits, 1, scratch)
            places = [tile.positive_rows + tile.rows.start]
            if tile.mirrored:
                negatives.add(tile.columns, tile.logits, 0, scratch)
                places.append(tile.positive_columns + tile.columns.start)
            for place in places if len(tile.positive_rows) else []:
                positives.add_at(place, tile.positive_logits)
                count.index_add_(0, place, torch.ones_like(tile.positive_logits))
                total.index_add_(0, place, tile.positive_logits)
        negative, own_positive, mean = negatives.value(), positives.value(), total / count
        counted = count > 0 if not decoupled else (count > 0) & torch.isfinite(negative)
        # log(1 + negatives ÷ positives) keeps its digits where p → 1.
        losses = negative - mean if decoupled else _softplus(negative - own_positive) + (own_positive - mean)
        ctx.save_for_backward(negative, own_positive, count, counted)
        ctx.tiles, ctx.decoupled = tiles, decoupled
        ctx.mark_non_differentiable(counted)
        return torch.where(counted, losses, 0.0), counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients for queries, keys and both scales."""
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        negative, positive, count, counted = saved
        tiles: _Tiles = ctx.tiles
        share = torch.where(counted, gradients[0], 0.0)
        whole = negative if ctx.decoupled else torch.logaddexp(negative, positive)
        whole = torch.where(counted, whole, 0.0)
        # ∂loss/∂s of a positive is p - 1/|P| = (r - 1/|P|) - r·π: r its softmax among the positives, π the negatives' share.
        # Written so, a single positive has -π exactly, where p - 1 would have lost the digits.
        missing = torch.ones_like(whole) if ctx.decoupled else (negative - whole).exp()
        wants_keys = ctx.needs_input_grad[1] and not tiles.symmetric
        for_queries = torch.zeros_like(tiles.queries)
        for_keys = torch.zeros_like(tiles.keys) if wants_keys else None
        for_other = torch.zeros_like(tiles.queries) if tiles.other_scale is not None else None

        def positive_weights(place: Tensor, logits: Tensor) -> Tensor:
            own_share = share[place]
            if ctx.decoupled:
                return -own_share / count[place]
            among = (logits - positive[place]).exp_()
            return own_share * ((among - 1 / count[place]) - among * missing[place])

        for tile in tiles:
            weights = torch.sub(tile.logits, whole[tile.rows, None], out=tiles.workspace(tile.rows, tile.columns))
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
                    for_keys[tile.columns].addmm_(
                        others.T, tiles.other_scale[tile.rows, None] * tiles.queries[tile.rows]
                    )
            for_queries[tile.rows].addmm_(weights, tiles.keys[tile.columns])
            if for_keys is not None:
                for_keys[tile.columns].addmm_(weights.T, tiles.scale[tile.rows, None] * tiles.queries[tile.rows])
        # A logit is scale · (query · key): what weighs the keys for the query's gradient weighs the scale's, too.
        halves = 0.5 if tiles.symmetric else 1.0
        for_scale = halves * (for_queries * tiles.queries).sum(1)
        for_queries *= tiles.scale[:, None]
        for_other_scale = None
        if for_other is not None and tiles.other_scale is not None:
            for_other_scale = (for_other * tiles.queries).sum(1)
            for_queries += for_other * tiles.other_scale[:, None]
        return for_queries, for_keys, for_scale, for_other_scale, None, None, None, None, None


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(x), x)
