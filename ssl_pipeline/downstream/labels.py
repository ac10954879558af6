"""Which labels stage two may read, and which of them choose: held out, in turn by cross-validation, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, FrozenModel, joined
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.splits import draw_labels, folds, stratified_split
from ssl_pipeline.downstream.task import DownstreamConfig

SHARE_HELD_OUT = 0.2
# The standard error of an accuracy on 200 images is at most 3.5 points. On 20 it is 11, more than most steps and settings differ by.
LEAST_HELD_OUT = 200
_FOLDS = 5


class LabelsConfig(FrozenModel):
    """How many labels stage two may read; all of them by default.

    Attributes:
        per_class: labels of each class, drawn by the seed.
        fraction: or a share of all labels, drawn by the seed.
        validation: the share of the drawn labels that is held out for selection; 0 selects nothing. ``auto``: 0.2 where that
            makes 200 images or more. Fewer can't tell steps or settings apart, so all labels are then learned from, the
            solved probe's weight decay is chosen by cross-validation on them, and the last step is kept.
    """

    per_class: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    validation: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] = "auto"

    @field_validator("validation", mode="before")
    @classmethod
    def _one_sentence(cls, value: object) -> object:
        is_share = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        if not is_share and value != "auto":
            raise ValueError(f"{value!r} is no share of the labels: give auto, or a number from 0 to below 1.")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> LabelsConfig:
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("give `per_class` or `fraction`, not both.")
        return self

    def held_out(self, count: int) -> int:
        """How many of so many labels are held out for selection."""
        if self.validation != "auto":
            return round(self.validation * count)
        automatic = round(SHARE_HELD_OUT * count)
        return automatic if automatic >= LEAST_HELD_OUT else 0


@dataclass(frozen=True)
class LabeledSplit:
    """The images that a regime learns from, and *training* labels that are held out for selection.

    ``folds`` are the parts of the cross-validation that the images of ``train`` are in, int64 of shape (N,); −1 for images that are
    in every training part. None: nothing is chosen by cross-validation.
    """

    train: IndexedDataset
    validation: IndexedDataset | None
    folds: Tensor | None = None


def describe_labels(pool: IndexedDataset, held_out: IndexedDataset, split: str) -> str:
    """Training and held-out images in a line: a folder that is a class by mistake is seen in it."""
    names = pool.classes or ()
    what = "outputs" if pool.labels is None else "classes"
    return (
        f"{len(pool)} training images of {pool.name}, {len(held_out)} to measure on (`{split}`); {len(names)} {what}: "
        f"{joined(names)}"
    )


def draw(labels: LabelsConfig, downstream: DownstreamConfig, pool: IndexedDataset, seed: int) -> LabeledSplit:
    """Draws a seed's labels; see :func:`draw_index` and :func:`draw_folds`."""
    train, held_out = drawn = draw_index(labels, downstream, pool, seed)
    parts = draw_folds(labels, downstream, pool, drawn, seed)
    return LabeledSplit(pool.select(train), None if held_out is None else pool.select(held_out), parts)


def draw_folds(
    labels: LabelsConfig,
    downstream: DownstreamConfig,
    pool: IndexedDataset,
    drawn: tuple[Tensor, Tensor | None],
    seed: int,
) -> Tensor | None:
    """The parts of a cross-validation (see :class:`LabeledSplit`), each with its share of every class of what was ``drawn``.

    None where labels are held out, nothing is to be chosen, or no class has two labels.
    """
    train, held_out = drawn
    if labels.validation != "auto" or held_out is not None or not downstream.selects:
        return None
    strata = downstream.strata(pool)
    classes = torch.zeros(len(train), dtype=torch.int64) if strata is None else strata[train]
    return folds(classes, _FOLDS, seed, "cross-validation")


def unlabeled_pool(
    labels: LabelsConfig, downstream: DownstreamConfig, pool: IndexedDataset, seed: int
) -> IndexedDataset:
    """All training images but those that a seed holds out for selection, without their labels."""
    _, held_out = draw_index(labels, downstream, pool, seed)
    index = torch.arange(len(pool))
    images = pool.select(index if held_out is None else index[~torch.isin(index, held_out)])
    images.labels = images.classes = None
    return images


def draw_index(
    labels: LabelsConfig, downstream: DownstreamConfig, pool: IndexedDataset, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Draws a seed's labels, evenly over the classes where an image has one, and holds some of them out for selection.

    One label of each class stays to learn from, whatever is held out.

    Returns:
        The images to learn from and those held out, sorted int64 indices of the pool; None where nothing is.

    Raises:
        ConfigError: a class has fewer labels than are asked for, or an image has no one class to count by.
    """
    strata = downstream.strata(pool)
    if strata is None:
        if labels.per_class is not None:
            raise ConfigError(
                f"`labels.per_class` counts images of one class, and {downstream.name} has no one class for an image: give "
                "`labels.fraction`, a share of all images."
            )
        strata = torch.zeros(len(pool), dtype=torch.int64)
    index = draw_labels(strata, labels.per_class, labels.fraction, seed, pool.classes)
    count = labels.held_out(len(index)) if downstream.selects else 0
    count = min(count, len(index) - len(strata[index].unique()))
    if count == 0:
        return index, None
    rest, held_out = stratified_split(strata[index], count, seed, "validation")
    for missing in set(strata[index].tolist()) - set(strata[index][rest].tolist()):
        back = held_out[strata[index][held_out] == missing][:1]
        rest, held_out = torch.cat([rest, back]).sort().values, held_out[held_out != back]
    return index[rest], index[held_out] if len(held_out) else None
