"""A folder of images and their masks, for semantic segmentation."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.bad_files import for_all, raise_all, warn_once
from ssl_pipeline.data.decode import upright_size
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.scan import images_in
from ssl_pipeline.data.source import HoldOutConfig, Images
from ssl_pipeline.data.splits import Split, splits_in
from ssl_pipeline.data.targets import IGNORE, Masks, read_mask


class Config(HoldOutConfig):
    """Images in ``images`` and masks in ``masks``, in pairs by the name before the ending.

    Splits are folders with ``images`` and ``masks`` in them (``train/images``), or folders in both of these
    (``images/train``): ``train``, and ``val`` (as ``val``) or ``test`` or both; without ``test``, ``val`` is the test. Splits
    that have no folder are held out of the training images.

    Attributes:
        path: the folder. Nothing in it is changed.
        classes: their names, in the order of the masks' numbers; null reads ``classes.txt`` in the folder, a name a line, or
            else numbers them.
        values: the numbers in the masks that stand for the classes, in their order, such as ``[0, 255]``; null takes 0, 1, 2, ….
            255 is no class unless it is named here: nothing is learned from such pixels, and nothing is measured on them.
        channels: 3 for RGB, 1 for grayscale.
    """

    path: str
    classes: tuple[str, ...] | None = None
    values: tuple[Annotated[int, Field(ge=0, le=255)], ...] | None = Field(None, min_length=2)
    channels: Literal[1, 3] = 3

    def read_images(self) -> Images:
        root = existing_folder(self.path, "data.path", "`images` and `masks`")
        names = self.classes or _names_in(root / "classes.txt")
        read = {split: _read(root, *parts) for split, parts in _folders(root).items()}
        classes, values = _checked(names, self.values, read, root)

        def source(own: _Pairs) -> FileDataset:
            masks = Masks(own.masks, own.sizes, own.counts[:, list(values)], classes, self.values)
            return FileDataset(str(own.folder), own.folder, own.images, self.channels).with_annotations(masks)

        train = source(read.pop("train"))
        own = {split: partial(source, pairs) for split, pairs in read.items()}
        return Images(train, torch.zeros(len(train), dtype=torch.int64), own)


class _Pairs(NamedTuple):
    """Images and masks of one folder, all of them checked; ``counts`` has the pixels of each number, int64 of shape (N, 256)."""

    folder: Path
    images: list[str]
    masks: list[Path]
    sizes: Tensor
    counts: Tensor


def _folders(root: Path) -> dict[Split, tuple[str, str]]:
    """Per split its folders of images and of masks, relative to the root."""
    above, inside = splits_in(root), splits_in(root / "images")
    if above:
        return {split: (f"{name}/images", f"{name}/masks") for split, name in above.items()}
    if not inside:
        return {"train": ("images", "masks")}
    masks = splits_in(root / "masks")
    if set(masks) != set(inside):
        raise ConfigError(
            f"{root / 'images'} has the splits {', '.join(inside.values())}, and {root / 'masks'} has "
            f"{', '.join(masks.values()) or 'none'}: both need the same folders."
        )
    return {split: (f"images/{name}", f"masks/{masks[split]}") for split, name in inside.items()}


def _names_in(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not written in UTF-8 ({error.reason}): save it so.") from error


@lru_cache(maxsize=8)
def _read(folder: Path, image_folder: str, mask_folder: str) -> _Pairs:
    """Reads a folder once in the process's life: every mask is checked, so that no run stops at one hours later."""
    images, masks = (_by_stem(folder / part) for part in (image_folder, mask_folder))
    without = sorted(set(images) - set(masks))
    alone = sorted(set(masks) - set(images))
    raise_all(
        [
            f"{images[stem]} has no mask: there should be a file {stem}.png in {folder / mask_folder}."
            for stem in without
        ]
        + [f"{masks[stem]} is a mask of no image: remove it, or add the image." for stem in alone]
    )
    stems = sorted(images)
    sizes = for_all([images[stem] for stem in stems], upright_size)
    expected = {masks[stem]: (images[stem], size) for stem, size in zip(stems, sizes, strict=True)}
    counts = for_all(list(expected), partial(_count, expected=expected))
    names = [images[stem].relative_to(folder).as_posix() for stem in stems]
    return _Pairs(folder, names, list(expected), torch.tensor(sizes), torch.stack(counts))


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}: images go into `images`, masks into `masks`.")
    files = images_in(folder)
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    if len(found) < len(files):
        twice = next(path for path in files if found[path.relative_to(folder).with_suffix("").as_posix()] != path)
        raise ConfigError(f"{twice} is not the only file of that name before the ending: rename it, or take it out.")
    if not files:
        raise ConfigError(f"{str(folder)!r} holds no image that Pillow reads (hidden files do not count).")
    return found


def _count(path: Path, expected: dict[Path, tuple[Path, tuple[int, int]]]) -> Tensor:
    """How many pixels of each number a mask has, int64 of shape (256,); it must have its image's size."""
    mask = np.asarray(read_mask(path))
    image, size = expected[path]
    if mask.shape != size:
        raise ConfigError(
            f"{path} has {mask.shape[1]}×{mask.shape[0]} pixels, and its image {image} has {size[1]}×{size[0]}: a mask has a "
            "pixel for every pixel of its image."
        )
    return torch.from_numpy(np.bincount(mask.ravel(), minlength=256))


def _checked(
    names: tuple[str, ...] | None, values: tuple[int, ...] | None, read: dict[Split, _Pairs], root: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The classes' names and their numbers in the masks; every number in a mask must be one of them.

    Raises:
        ConfigError: one is not, names and values do not fit, or what is most likely a class is the number of no class.
    """
    counts = torch.cat([pairs.counts for pairs in read.values()]).sum(0)
    present: list[int] = counts.nonzero()[:, 0].tolist()
    inside = [number for number in present if number != IGNORE]
    if values is None:
        values = tuple(range(max(inside, default=0) + 1 if names is None else len(names)))
    elif names is not None and len(names) != len(values):
        raise ConfigError(
            f"`data.values` has {len(values)} numbers, and there are {len(names)} classes ({joined(names)})."
        )
    elif len(set(values)) < len(values):
        raise ConfigError(f"`data.values` is {list(values)}: each class needs a number of its own.")
    else:
        inside = [number for number in present if number != IGNORE or IGNORE in values]
    names = tuple(map(str, values)) if names is None else names
    if present and not set(inside) - {0} and IGNORE not in values and IGNORE in present:
        raise ConfigError(
            f"the masks in {str(root)!r} hold {joined([str(number) for number in present])} alone, and {IGNORE} means that a pixel "
            f"is of no class, so there is nothing to learn. If {IGNORE} is a class, say so by `data.values={present}`."
        )
    _refuse_other_numbers(names, values, read)
    used = [name for name, value in zip(names, values, strict=True) if value in inside]
    if len(used) < len(names):
        note = f" ({IGNORE}, which is there, is no class)" if IGNORE in present and IGNORE not in values else ""
        warn_once(
            f"{root}: {len(used)} of {len(names)} classes occur in the masks: {joined(used)}{note}. If their numbers stand for "
            f"classes without gaps, say so by `data.values={present}`."
        )
    return names, values


def _refuse_other_numbers(names: tuple[str, ...], values: tuple[int, ...], read: dict[Split, _Pairs]) -> None:
    others = [number for number in range(IGNORE) if number not in values]
    raise_all(
        [
            f"{mask} holds the number {others[int(counts[others].nonzero()[0])]}, and {len(names)} classes are named "
            f"({joined(names)}), for the numbers {joined([str(value) for value in values])}: name the others, see `data.values`, or "
            f"mend the mask ({IGNORE} is no class)."
            for pairs in read.values()
            for mask, counts in zip(pairs.masks, pairs.counts, strict=True)
            if others and bool(counts[others].any())
        ]
    )
