"""A folder of domains, each a folder of classes: ``domain/class/image``, as of PACS, Office-Home or DomainNet.

Splits may be folders, too: ``train/domain/class/image`` or ``domain/train/class/image``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.bad_files import BadFilesLimit, warn_once
from ssl_pipeline.data.file_table import as_text
from ssl_pipeline.data.image_files import FileDataset, ImageFiles, PreparedConfig, scan_folder
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
        tree = _scan(existing_folder(self.path, "data.path", "the domains"), self.max_bad_files, self.base)
        test = tree.numbers(self.test_domains or (), "test_domains")
        train = tree.numbers(self.domains or tree.names, "domains")
        if self.domains is None:
            train = [number for number in train if number not in test]
        both = [tree.names[number] for number in train if number in test]
        if both or not train:
            raise ConfigError(
                f"`data.test_domains`: {', '.join(both) or 'every domain'} would be trained on and tested on: name it in one "
                f"place. The folder's domains: {', '.join(tree.names)}."
            )
        every = tree.images.dataset(
            self, str(tree.images.root), labels=tree.labels, classes=tree.classes, domains=tree.domains,
            domain_names=tree.names,
        )  # fmt: skip
        pool, of_test = tree.files_of(train), tree.files_of(test)
        of_split = {split: pool[files[pool]] for split, files in tree.splits.items()}
        if not test and "test" not in of_split and "val" in of_split:
            of_split["test"] = of_split.pop("val")
        learned = of_split.pop("train", pool)

        def open_test_domains() -> FileDataset:
            unseen = set(tree.labels[of_test].tolist()) - set(tree.labels[pool].tolist())
            if unseen:
                raise ConfigError(
                    f"`data.test_domains`: the classes {joined([tree.classes[label] for label in sorted(unseen)])} are "
                    "in no training domain, so nothing could learn them: leave their folders out, or train on another domain."
                )
            return every.select(of_test)

        own: dict[Split, Callable[[], FileDataset]] = {part: partial(every.select, of) for part, of in of_split.items()}
        own |= {"test": open_test_domains} if test else {}
        # Numbered by domain and class, so that each of both is held out in proportion.
        cells = tree.domains[learned] * len(tree.classes) + tree.labels[learned]
        return Images(every.select(learned), cells, own)


@dataclass(frozen=True)
class _DomainTree:
    """A folder of domains: their names, all their classes, per file its domain and class, and per split that has folders its files.

    Attributes:
        splits: bool of shape (N,) for each; empty without folders of splits.
    """

    images: ImageFiles
    names: tuple[str, ...]
    classes: tuple[str, ...]
    domains: Tensor
    labels: Tensor
    splits: dict[Split, Tensor]

    def numbers(self, names: tuple[str, ...], key: str) -> list[int]:
        """The numbers of domains."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ConfigError(
                f"`data.{key}`: {str(self.images.root)!r} has no domain {', '.join(map(repr, unknown))}. Its domains: "
                f"{', '.join(self.names)}."
            )
        return [self.names.index(name) for name in names]

    def files_of(self, domains: list[int]) -> Tensor:
        """The files of some domains, a sorted int64 index."""
        return torch.isin(self.domains, torch.tensor(domains, dtype=torch.int64)).nonzero()[:, 0]


@lru_cache(maxsize=4)
def _scan(root: Path, limit: BadFilesLimit, base: Path | None) -> _DomainTree:
    """Reads a folder once in the process's life."""
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
    return _DomainTree(images, names, classes, domains, labels, splits)


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
