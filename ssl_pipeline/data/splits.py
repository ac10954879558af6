"""Which samples are held out, and whose labels may be read: by named draws, evenly over the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.draws import Name, permutation


def _shuffled_classes(labels: Tensor, *name: Name) -> dict[int, Tensor]:
    """Per class its samples in a random order; label −1 means that there is none."""
    order = permutation(len(labels), *name)
    return {int(c): order[labels[order] == c] for c in labels.unique() if c >= 0}


def hold_out(labels: Tensor, count: int, *name: Name) -> tuple[Tensor, Tensor]:
    """Holds samples out, as evenly over the classes as their sizes allow.

    Args:
        labels: int64 of shape (N,).
        count: how many to hold out.
        name: of the draw.

    Returns:
        The rest and the held-out ones, each a sorted int64 index.
    """
    ranked = [
        (rank / len(of_class), c, int(i))
        for c, of_class in _shuffled_classes(labels, *name).items()
        for rank, i in enumerate(of_class)
    ]
    held_out = torch.tensor(sorted(i for _, _, i in sorted(ranked)[:count]), dtype=torch.int64)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0], held_out


def draw_labels(labels: Tensor, per_class: int | None, fraction: float | None, seed: int) -> Tensor:
    """The samples whose labels may be read, a sorted int64 index.

    Args:
        labels: int64 of shape (N,); −1 means that there is none.
        per_class: labels of each class; or
        fraction: a share of each class, at least one; or neither: all.
        seed: of the draw; more labels of the same seed contain the fewer.

    Raises:
        ConfigError: a class has fewer than asked for.
    """
    drawn = []
    for c, of_class in _shuffled_classes(labels, seed, "labels").items():
        count = len(of_class)
        if per_class is not None:
            if per_class > count:
                raise ConfigError(f"`labels.per_class` is {per_class}, and class {c} has only {count} labelled images.")
            count = per_class
        elif fraction is not None:
            count = max(1, round(fraction * count))
        drawn.append(of_class[:count])
    return torch.cat(drawn).sort().values
