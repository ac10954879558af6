"""What multi-label classification and regression ask of their columns of numbers."""

from __future__ import annotations

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.targets import NumericTargets, annotations_of


def check_numbers(task: str, source: IndexedDataset, held_out: IndexedDataset | None) -> list[str]:
    """What columns of numbers lack, in training and in what is measured on, as sentences."""
    problems = []
    for images in (source, held_out):
        if images is None:
            continue
        numbers = annotations_of(images, NumericTargets)
        if numbers is None:
            return [
                f"{task} needs numbers beside its images, and {images.name} has none: take data=table, and name their columns by "
                "`data.target_columns`."
            ]
        for name, column in zip(numbers.names, numbers.values.unbind(1), strict=True):
            if bool(column.isnan().all()):
                where = "training images" if images is source else "images to measure on"
                problems.append(
                    f"{images.name}: {name!r} has no value in any of the {where}: fill it in, or leave it out."
                )
    return problems
