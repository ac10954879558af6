"""Batches of two sides: labeled images, and beside them others whose labels are not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.multi_view import Views


class PairedLoader(IndexedLoader):
    """Labeled samples, then the target's, with label −1 and numbered in the target's own dataset.

    Each side has epochs of its own length and an order of its own; time is counted in the labeled side's epochs. If one side
    has more views than the other, the later ones are that side's alone.

    Args:
        source: labeled samples; their ``views`` and ``size``, samples of a step over all processes.
        target: samples whose labels are not read; their ``target_views`` and ``target_size``, by default ``size``.
    """

    def __init__(
        self,
        source: IndexedDataset,
        target: IndexedDataset,
        views: Views,
        target_views: Views,
        size: int,
        seed: int,
        share: DistInfo,
        total_steps: int,
        workers: int | None = None,
        target_size: int | None = None,
    ) -> None:
        super().__init__(source, views, size, seed, share, total_steps, workers, with_labels=True)
        other = derive_seed(seed, "target")
        self.target = IndexedLoader(target, target_views, target_size or size, other, share, total_steps, workers)

    def position(self, step: int) -> dict[str, Any]:
        return {**super().position(step), "target": self.target.position(self._of_target(step))}

    def resume(self, position: Mapping[str, Any], taken: int, in_steps: bool) -> int:
        step = super().resume(position, taken, in_steps)
        own = self.target.resume(position["target"], taken, in_steps=False)
        self.target.total_steps = own + self.total_steps - step
        return step

    def _of_target(self, step: int) -> int:
        """The target's step that goes with one of the labeled side: the two end together."""
        return step + self.target.total_steps - self.total_steps

    @property
    def unreadable(self) -> int:
        same = self.source.bad_files is self.target.source.bad_files  # both sides are images of one folder
        return super().unreadable + (0 if same else self.target.unreadable)

    def new_errors(self) -> dict[str, Any]:
        sides = {"source": super().new_errors(), "target": self.target.new_errors()}
        return {side: faults for side, faults in sides.items() if faults}

    def merge_errors(self, found: Sequence[Mapping[str, Any]]) -> None:
        super().merge_errors([faults.get("source", {}) for faults in found])
        self.target.merge_errors([faults.get("target", {}) for faults in found])

    def check_bad_files(self) -> None:
        super().check_bad_files()  # each side has its own limit
        self.target.check_bad_files()

    def state_dict(self) -> dict[str, Any]:
        return {"source": super().state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state["source"])
        self.target.load_state_dict(state["target"])

    def from_step(self, start: int) -> Iterator[Batch]:
        for ours, theirs in zip(super().from_step(start), self.target.from_step(self._of_target(start)), strict=True):
            assert ours.label is not None
            sides = zip_longest(ours.views, theirs.views)
            views = [torch.cat([view for view in pair if view is not None]) for pair in sides]
            label = torch.cat([ours.label, torch.full_like(theirs.index, -1)])
            domain = None
            if ours.domain is not None and theirs.domain is not None:
                domain = torch.cat([ours.domain, theirs.domain])
            yield Batch(ours.clock, torch.cat([ours.index, theirs.index]), views, label, domain)
