"""Which class an image is of, for whoever shows images."""

from __future__ import annotations

from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset


def class_name(source: IndexedDataset, sample: int) -> str | None:
    """The name of an image's class; None where it is not known."""
    if source.labels is None or source.classes is None or int(source.labels[sample]) < 0:
        return None
    return source.classes[int(source.labels[sample])]


def one_of_each_class(source: IndexedDataset, index: Tensor) -> list[int]:
    """Places in ``index``: the first of each class, in the order of the classes, then whatever is left."""
    labels = [] if source.labels is None else source.labels[index].tolist()
    first = {label: labels.index(label) for label in sorted(set(labels)) if label >= 0}
    chosen = set(first.values())
    return [*first.values(), *(place for place in range(len(index)) if place not in chosen)]
