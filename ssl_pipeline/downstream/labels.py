"""Which labels stage two may read, and which of them are held out for selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, Strict
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.data.splits import draw_labels, hold_out
from ssl_pipeline.data.verdicts import listed
from ssl_pipeline.downstream.task import DownstreamConfig


class LabelsConfig(Strict):
    """How many labels stage two may read; all of them by default.

    Attributes:
        per_class: labels of each class, drawn by the seed.
        fraction: or a share of all labels, drawn by the seed.
        validation: the share of the drawn labels that is held out for selection; 0 selects nothing.
    """

    per_class: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    validation: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> LabelsConfig:
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("give `per_class` or `fraction`, not both.")
        return self


@dataclass(frozen=True)
class Labelled:
    """What a regime learns from: a source's labelled part, and held-out *training* labels for selection, or None."""

    train: Indexed
    validation: Indexed | None


def told_of(pool: Indexed, held_out: Indexed, split: str) -> str:
    """What stage two learns from and is measured on, in a line: a folder that is a class by mistake is seen in it."""
    names = pool.classes or ()
    what = "outputs" if pool.labels is None else "classes"
    return (
        f"{len(pool)} training images of {pool.name}, {len(held_out)} to measure on (`{split}`); {len(names)} {what}: "
        f"{listed(names)}"
    )


def draw(labels: LabelsConfig, downstream: DownstreamConfig, pool: Indexed, seed: int) -> Labelled:
    """Draws a seed's labels; see :func:`draw_index`."""
    train, held_out = draw_index(labels, downstream, pool, seed)
    return Labelled(pool.select(train), None if held_out is None else pool.select(held_out))


def without_labels(labels: LabelsConfig, downstream: DownstreamConfig, pool: Indexed, seed: int) -> Indexed:
    """All training images but those that a seed holds out for selection; their labels are taken away."""
    _, held_out = draw_index(labels, downstream, pool, seed)
    index = torch.arange(len(pool))
    images = pool.select(index if held_out is None else index[~torch.isin(index, held_out)])
    images.labels = images.classes = None
    return images


def draw_index(
    labels: LabelsConfig, downstream: DownstreamConfig, pool: Indexed, seed: int
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
    count = round(labels.validation * len(index)) if downstream.selects else 0
    count = min(count, len(index) - len(strata[index].unique()))
    if count == 0:
        return index, None
    rest, held_out = hold_out(strata[index], count, seed, "validation")
    for missing in set(strata[index].tolist()) - set(strata[index][rest].tolist()):
        back = held_out[strata[index][held_out] == missing][:1]
        rest, held_out = torch.cat([rest, back]).sort().values, held_out[held_out != back]
    return index[rest], index[held_out] if len(held_out) else None
