"""What splits are called, which samples are held out, and whose labels may be read: by named draws, evenly over the classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.rng import Name, permutation

Split = Literal["train", "val", "test"]
Part = Literal["train", "val", "test", "pool"]  # pool: what stage one learns from
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF: dict[str, Split] = {name: split for split, names in SPLIT_NAMES.items() for name in names}


def split_named(name: str) -> Split | None:
    """The split that a folder, a column's value or a dataset's own split is named for; None where it is named for none.

    Capitals and blanks around the name do not count, and neither does a final "set": ``Training_Set`` is ``train``.
    """
    plain = name.strip().casefold()
    return _SPLIT_OF.get(plain) or _SPLIT_OF.get(re.sub(r"[ _-]?set$", "", plain))


def resembles_split(name: str) -> bool:
    """Whether a word of a name is a split's, as of ``extra_test`` or ``train2017``: worth a line in the log, and no more."""
    words: list[str] = re.findall(r"[^\W\d_]+", name.casefold())
    return split_named(name) is not None or any(word in _SPLIT_OF for word in words)


def splits_among(names: Iterable[str], where: str) -> dict[Split, str]:
    """The splits that some names of folders stand for; empty unless there is ``train`` and another one.

    Raises:
        ConfigError: two names mean the same split.
    """
    found = {name: split for name in sorted(names) if (split := split_named(name)) is not None}
    if "train" not in found.values() or len(found) < 2:
        return {}
    for split in SPLIT_NAMES:
        alike = [name for name, own in found.items() if own == split]
        if len(alike) > 1:
            raise ConfigError(
                f"{where} holds {' and '.join(map(repr, alike))}, and each is a name of the split `{split}`: rename one of "
                "them, or move it out."
            )
    return {split: name for name, split in found.items()}


def splits_in(root: Path) -> dict[Split, str]:
    """The names of the splits' folders directly in a folder; empty where it has none, or is not there.

    Without ``test``, ``val`` is the test. A warning names the folders beside them, which are not read, and what looks like a split
    without being one.

    Raises:
        ConfigError: two folders mean the same split.
    """
    if not root.is_dir():
        return {}
    below = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    named = splits_among(below, repr(str(root)))
    others = [name for name in below if name not in named.values()]
    if named and others:
        splits, rest = (joined(names) for names in (list(named.values()), others))
        warn_once(f"{root}: the splits are {splits}; not used: {rest}.")
    elif similar := [name for name in others if resembles_split(name)]:
        warn_once(
            f"{root}: {joined(similar)} look like splits and are not used as such: splits are `train` with `val` or "
            "`test` beside it. Rename the folders if they are."
        )
    if named and "test" not in named:
        named["test"] = named.pop("val")
    return named


def _class_by_class(labels: Tensor, *name: Name) -> Tensor:
    """The labeled samples, those of one class after those of another, in a random order within each."""
    order = permutation(len(labels), *name)
    order = order[labels[order] >= 0]
    return order[labels[order].argsort(stable=True)]


def stratified_split(labels: Tensor, count: int, *name: Name) -> tuple[Tensor, Tensor]:
    """Holds samples out, of each class in proportion to its size, to within one sample.

    A rank counts from its middle, so that of a very small class nothing is held out rather than everything.

    Args:
        labels: int64 of shape (N,); of −1, no label, none is held out.
        count: how many to hold out.
        name: of the draw.

    Returns:
        The rest and the held-out ones, each a sorted int64 index.
    """
    order = _class_by_class(labels, *name)
    classes = labels[order]
    sizes = classes.bincount()
    rank = torch.arange(len(order), dtype=torch.float64) - (sizes.cumsum(0) - sizes)[classes]
    first = np.lexsort((order, classes, (rank + 0.5) / sizes[classes]))[:count]
    held_out = order[torch.from_numpy(first)].sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero()[:, 0], held_out


def folds(labels: Tensor, most: int, *name: Name) -> Tensor | None:
    """Cuts samples into the parts of a cross-validation, each class evenly over them, to within one sample.

    Args:
        labels: int64 of shape (N,), without −1.
        most: parts at most; no more than the largest class has samples.
        name: of the draw.

    Returns:
        The number of each sample's part from 0 on, int64 of shape (N,). A class's only sample is in none, −1, since nothing would
        teach its class when it is left out. None where no class has two samples.
    """
    sizes = labels.bincount()
    count = min(most, int(sizes.max())) if len(labels) else 0
    if count < 2:
        return None
    order = _class_by_class(labels, *name)
    order = order[sizes[labels[order]] > 1]
    part = torch.full((len(labels),), -1)
    part[order] = torch.arange(len(order)) % count  # neighbors are in different parts, so no part has all of a class
    return part


def draw_name(split: Part) -> str:
    """A split in the name of a draw: hashed, so that another name would share the images out anew."""
    return "dev" if split == "val" else split


def split_three(labels: Tensor, test: float | None, val: float | None, *name: Name) -> dict[Part, Tensor]:
    """Shares the samples of one pool out among the splits, the same way for every seed.

    Args:
        labels: int64 of shape (N,), what the shares are even over; samples of −1 stay in ``train``.
        test: the share of all samples that is for the final figures; None where the test is elsewhere.
        val: the share of the rest that is for choices; None where ``val`` is elsewhere.
        name: of the draw.

    Returns:
        Per split a sorted int64 index: ``train``, and ``test`` and ``val`` where they have a share; and ``pool``, all that
        is not ``test``.
    """
    index: dict[Part, Tensor] = {"train": torch.arange(len(labels))}
    shares: tuple[tuple[Part, float | None], ...] = (("test", test), ("val", val))
    for split, share in shares:
        if split == "val":
            index["pool"] = index["train"]
        if share is not None:
            pool = index["train"]
            count = max(1, round(share * int((labels[pool] >= 0).sum())))
            rest, held_out = stratified_split(labels[pool], count, *name, draw_name(split))
            index["train"], index[split] = pool[rest], pool[held_out]
    return index


def draw_labels(
    labels: Tensor, per_class: int | None, fraction: float | None, seed: int, classes: Sequence[str] | None = None
) -> Tensor:
    """The samples whose labels may be read, a sorted int64 index.

    Args:
        labels: int64 of shape (N,); −1 means that there is none.
        per_class: labels of each class; or
        fraction: a share of each class, at least one; or neither: all.
        seed: of the draw; more labels of the same seed contain the fewer.
        classes: their names, for the message.

    Raises:
        ConfigError: a class has fewer than asked for, or nothing has a label.
    """
    order, drawn = _class_by_class(labels, seed, "labels"), []
    for c, of_class in enumerate(order.split(labels[order].bincount().tolist())):
        count = len(of_class)
        if not count:
            continue
        if per_class is not None:
            if per_class > count:
                name = repr(classes[c]) if classes is not None else str(c)
                raise ConfigError(
                    f"`labels.per_class` is {per_class}, and class {name} has only {count} labeled images: "
                    f"ask for at most {count}, or add images."
                )
            count = per_class
        elif fraction is not None:
            count = max(1, round(fraction * count))
        drawn.append(of_class[:count])
    if not drawn:
        raise ConfigError("no training image has a label to draw: put images into one folder per class.")
    return torch.cat(drawn).sort().values
