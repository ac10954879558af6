"""A folder of domains, each a folder of classes: ``domain/class/image``, as of PACS, Office-Home or DomainNet.

Splits may be folders, too: ``train/domain/class/image`` or ``domain/train/class/image``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.bad_files import BadFilesLimit, warn_once
from ssl_pipeline.data.image_files import FileDataset, ImageFiles, PreparedConfig, scan_folder
from ssl_pipeline.data.image_index import as_text
from ssl_pipeline.data.source import Images
from ssl_pipeline.data.splits import SPLIT_NAMES, Split, resembles_split, split_named, splits_among


class Config(PreparedConfig):
    """Images of the same classes from several domains.

    Classes and domains are numbered over the whole folder, so that a number means the same whichever domains are chosen.
    Folders of splits (``train`` with ``val`` or ``test``, above the domains or in each of them) are read as splits; without
    ``test``, ``val`` is the test unless there are ``test_domains``. Held-out images are even over domains and classes.

    Attributes:
        path: the folder. Nothing in it is changed.
        domains: those to train on; null takes all that are not in ``test_domains``.
        test_domains: domains that are for the final figures alone, whole; null holds images of ``domains`` out.
    """

    path: str
    domains: tuple[str, ...] | None = None
    test_domains: tuple[str, ...] | None = None

    def read_images(self) -> Images:
        images, known, splits = _scan(
            existing_folder(self.path, "data.path", "the domains"), self.max_bad_files, self.base
        )
        every = images.dataset(self, str(images.root), **known)
        names, classes, domains, labels = (known[key] for key in ("domain_names", "classes", "domains", "labels"))

        def files_of(wanted: Sequence[str], key: str) -> Tensor:
            """The files of some domains, a sorted int64 index."""
            unknown = [name for name in wanted if name not in names]
            if unknown:
                raise ConfigError(
                    f"`data.{key}`: {str(images.root)!r} has no domain {', '.join(map(repr, unknown))}. Its domains: "
                    f"{', '.join(names)}."
                )
            numbers = torch.tensor([names.index(name) for name in wanted], dtype=torch.int64)
            return torch.isin(domains, numbers).nonzero()[:, 0]

        test = self.test_domains or ()
        of_test = files_of(test, "test_domains")
        train = self.domains or tuple(name for name in names if name not in test)
        pool = files_of(train, "domains")
        both = [name for name in train if name in test]
        if both or not train:
            raise ConfigError(
                f"`data.test_domains`: {', '.join(both) or 'every domain'} would be trained on and tested on: name it in one "
                f"place. The folder's domains: {', '.join(names)}."
            )
        of_split = {split: pool[files[pool]] for split, files in splits.items()}
        if not test and "test" not in of_split and "val" in of_split:
            of_split["test"] = of_split.pop("val")
        learned = of_split.pop("train", pool)

        def open_test_domains() -> FileDataset:
            unseen = set(labels[of_test].tolist()) - set(labels[pool].tolist())
            if unseen:
                raise ConfigError(
                    f"`data.test_domains`: the classes {joined([classes[label] for label in sorted(unseen)])} are in no "
                    "training domain, so nothing could learn them: leave their folders out, or train on another domain."
                )
            return every.select(of_test)

        own: dict[Split, Callable[[], FileDataset]] = {
            split: partial(every.select, of) for split, of in of_split.items()
        }
        own |= {"test": open_test_domains} if test else {}
        # Numbered by domain and class, so that each of both is held out in proportion.
        return Images(every.select(learned), domains[learned] * len(classes) + labels[learned], own)


@lru_cache(maxsize=4)
def _scan(
    root: Path, limit: BadFilesLimit, base: Path | None
) -> tuple[ImageFiles, dict[str, Any], dict[Split, Tensor]]:
    """Reads a folder once in the process's life.

    Returns:
        Its images, their classes and domains as a dataset takes them, and per split that has folders which files lie in them,
        bool of shape (N,).
    """
    images = scan_folder(root, base, limit, depth=2)
    if not images.files:
        raise ConfigError(
            f"`data.path`: {str(root)!r} holds no image at domain/class/image. For a folder of classes without domains take "
            "`data=folder`."
        )
    images.refuse_lost_folders(levels=2)
    folders, of_file = images.by_folder(as_text)
    level, splits = _level_of_splits([folder.split("/") for folder in folders], root), dict[Split, Tensor]()
    if level is not None:
        parts = [path[level] if len(path := folder.split("/")) >= 3 else "" for folder in folders]
        found = [split_named(part) for part in parts]
        kept = torch.tensor([split is not None for split in found])[of_file]
        if not bool(kept.any()):
            raise ConfigError(
                f"`data.path`: {str(root)!r} has folders of splits and holds no image at split/domain/class or "
                "domain/split/class. For splits of classes without domains take `data=folder`."
            )
        images = replace(images, files=images.files.select(kept))
        of_file = of_file[kept]
        splits = {
            split: torch.tensor([own == split for own in found])[of_file] for split in SPLIT_NAMES if split in found
        }

    def name(depth: int, folder: str) -> str:
        path = as_text(folder).split("/")
        return (path if level is None else path[:level] + path[level + 1 :])[depth]

    (names, domains), (classes, labels) = (images.by_folder(partial(name, depth)) for depth in (0, 1))
    return images, {"labels": labels, "classes": classes, "domains": domains, "domain_names": names}, splits


def _level_of_splits(paths: list[list[str]], root: Path) -> int | None:
    """Which level of the folders is that of splits: 0 above the domains, 1 in them; None where there is none."""
    tops, seconds = ({path[level] for path in paths} for level in (0, 1))
    named = splits_among(tops, repr(str(root)))
    if named:
        others = sorted(tops - set(named.values()))
        if others:
            warn_once(f"{root}: not used: {joined(others)}, which are named for no split.")
        return 0
    kinds = {split_named(name) for name in seconds}
    if "train" in kinds and len(kinds) > 1 and None not in kinds:
        return 1
    similar = sorted(name for name in tops | seconds if resembles_split(name))
    if similar:
        warn_once(
            f"{root}: {joined(similar)} look like splits and are taken as domains or classes: splits are `train` with "
            "`val` or `test`, above all domains or in each of them."
        )
    return None
