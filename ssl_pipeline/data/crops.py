"""A step's files, decoded and cropped: the part of loading that a worker does."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.transforms.multi_view import Views

NEIGHBORS = 64  # that are tried in the place of a file that can't be decoded


@dataclass
class Crops:
    """A step's cropped images.

    Attributes:
        index: the samples, int64 of shape (B,); one that can't be decoded is replaced by a neighbor, here too.
        views: per view uint8 of shape (B, C, S, S).
        faults: of the samples that were replaced, what is wrong with them.
    """

    index: Tensor
    views: list[Tensor]
    faults: dict[int, DecodeError]


def read_crops(source: IndexedDataset, views: Views, index: Tensor, epoch: int) -> Crops:
    """Decodes files, each once for all its views and as small as they allow, and crops them.

    Raises:
        DecodeError: so many neighbors can't be decoded either that something else must be wrong.
    """
    index, images, faults = index.clone(), dict[int, Image.Image](), dict[int, DecodeError]()
    pending = list(range(len(index)))
    for _ in range(NEIGHBORS):
        sizes = source.sizes(index)
        factors = [1] * len(index) if sizes is None else views.reductions(sizes, index, epoch)
        failed = []
        for place in pending:
            try:
                images[place] = source.open_reduced(int(index[place]), factors[place])
            except DecodeError as error:
                faults[int(index[place])] = error
                failed.append(place)
        if not failed:
            return Crops(index, views.of_files([images[i] for i in range(len(index))], index, epoch, sizes), faults)
        for place in failed:
            index[place] = source.neighbor(int(index[place]))
        pending = failed
    raise next(reversed(faults.values()))
