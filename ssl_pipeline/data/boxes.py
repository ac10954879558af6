"""Boxes: where the objects of an image are, and of which class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_pipeline.data.annotated import Annotations, place_of_views
from ssl_pipeline.transforms.policy import Views


class Boxes(Annotations):
    """Any number of boxes per image.

    Args:
        boxes: per image float32 of shape (n, 4): left, top, right, bottom in its pixels, all of them inside it.
        labels: per image their classes, int64 of shape (n,).
        sizes: heights and widths of the images, int64 of shape (N, 2).
        names: of the classes.
        crowds: per image the boxes and the classes, as above, of regions that hold too many objects to be told apart. Nothing is
            learned from them, and what is found in them is neither right nor wrong; none by default.
    """

    def __init__(
        self,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Tensor,
        names: tuple[str, ...],
        crowds: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.boxes, self.labels, self.sizes, self.names = list(boxes), list(labels), sizes, names
        none = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
        self.crowds = [none] * len(self.boxes) if crowds is None else list(crowds)

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: Tensor) -> Boxes:
        chosen = index.tolist()
        boxes, labels, crowds = ([side[i] for i in chosen] for side in (self.boxes, self.labels, self.crowds))
        return Boxes(boxes, labels, self.sizes[index], self.names, crowds)

    def digest(self) -> bytes:
        digest = hashlib.blake2b(self.sizes.numpy().tobytes(), digest_size=16)
        for boxes, labels in zip(self.boxes, self.labels, strict=True):
            digest.update(len(boxes).to_bytes(4) + boxes.numpy().tobytes() + labels.numpy().tobytes())
        for boxes, labels in self.crowds:
            digest.update(boxes.numpy().tobytes() + labels.numpy().tobytes())
        return digest.digest()

    def counts(self) -> Tensor:
        """Boxes of each class, crowds aside, int64 of shape (K,)."""
        return torch.cat([*self.labels, torch.empty(0, dtype=torch.int64)]).bincount(minlength=len(self.names))

    def of_views(self, index: Tensor, views: Views, epoch: int) -> list[dict[str, Tensor]]:
        """The boxes in the first views, per sample ``boxes`` (n, 4) in the view's pixels and ``labels`` (n,).

        A box whose center lies outside of the crop is dropped (Liu et al. 2016); one that reaches out of it is cut off.
        """
        crops, mirrored = place_of_views(index, views, epoch, self.sizes)
        size, targets = views.config.size, []
        for i, crop, mirror in zip(index.tolist(), crops.float(), mirrored.tolist(), strict=True):
            (top, left, height, width), boxes = crop.unbind(), self.boxes[i]
            scale = size / torch.stack([width, height, width, height])
            boxes = (boxes - torch.stack([left, top, left, top])) * scale
            if mirror:
                boxes = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
            center = (boxes[:, :2] + boxes[:, 2:]) / 2
            boxes, inside = boxes.clamp(0, size), ((center > 0) & (center < size)).all(1)
            kept = inside & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)  # less than a pixel is nothing to look at
            targets.append({"boxes": boxes[kept], "labels": self.labels[i][kept]})
        return targets

    def whole(self, index: int) -> dict[str, Tensor]:
        """One image's ``boxes`` and ``labels``, crowds last, which of them are crowds (``iscrowd``), and its ``size``: height and width."""
        crowd_boxes, crowd_labels = self.crowds[index]
        return {
            "boxes": torch.cat([self.boxes[index], crowd_boxes]),
            "labels": torch.cat([self.labels[index], crowd_labels]),
            "iscrowd": torch.arange(len(self.boxes[index]) + len(crowd_boxes)).ge(len(self.boxes[index])).long(),
            "size": self.sizes[index],
        }
