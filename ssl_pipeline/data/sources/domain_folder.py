"""A folder of domains, each a folder of classes: ``domain/class/image``, as of PACS, Office-Home or DomainNet.

Splits may be folders, too: ``train/domain/class/image`` or ``domain/train/class/image``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.bad_files import BadFilesLimit, warn_once
from ssl_pipeline.data.image_files import FileDataset, ImageFiles, PreparedConfig, scan_folder
from ssl_pipeline.data.image_index import as_text
from ssl_pipeline.data.source import Part, Split
from ssl_pipeline.data.splits import SPLIT_NAMES, part_of, resembles_split, split_named, split_three, splits_among


class Config(PreparedConfig[FileDataset]):
    """Images of the same classes from several domains.

    Classes and domains are numbered over the whole folder, so that a number means the same whichever domains are chosen.
    Folders of splits (``train`` with ``val`` or ``test``, above the domains or in each of them) are read as splits; without
    ``test``, ``val`` is the test unless there are ``test_domains``.

    Attributes:
        path: the folder. Nothing in it is changed.
        domains: those to train on; null takes all that are not in ``test_domains``.
        test_domains: domains that are for the final figures alone, whole; null holds images of ``domains`` out.
        val: the share of the training domains' images that is held out for choices, evenly over domains and classes.
        test: the share that is held out for the final figures where there are no ``test_domains``.
        license: of the images, where you know it.
    """

    path: str
    domains: tuple[str, ...] | None = None
    test_domains: tuple[str, ...] | None = None
    val: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    license: str | None = None

    def open_part(self, part: Part) -> FileDataset:
        """A split, or all images of the training domains but those of the test.

        Raises:
            ConfigError: the folder is missing or is not ``domain/class/image``, holds too many bad files, or a domain is not
                in it.
        """
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
        pool, of_test = tree.files_of(train), tree.files_of(test)
        if part == "test" and test:
            unseen = set(tree.labels[of_test].tolist()) - set(tree.labels[pool].tolist())
            if unseen:
                raise ConfigError(
                    f"`data.test_domains`: the classes {joined([tree.classes[label] for label in sorted(unseen)])} are "
                    "in no training domain, so nothing could learn them: leave their folders out, or train on another domain."
                )
            return self._dataset(tree, of_test)
        folders = tree.split_folders(with_test=bool(test))
        if part != "train" and part != "pool" and part in folders:
            return self._dataset(tree, pool[folders[part][pool]])
        if folders:
            pool = pool[folders["train"][pool]]
        # Numbered by domain and class, so that each of both is held out in proportion.
        cells = tree.domains[pool] * len(tree.classes) + tree.labels[pool]
        test_share, val_share = None if test or "test" in folders else self.test, None if "val" in folders else self.val
        return part_of(self._dataset(tree, pool), split_three(cells, test_share, val_share, "domain folder"), part)

    def _dataset(self, tree: _DomainTree, index: Tensor) -> FileDataset:
        source = tree.images.dataset(
            self, str(tree.images.root), labels=tree.labels, classes=tree.classes, domains=tree.domains,
            domain_names=tree.names,
        ).select(index)  # fmt: skip
        source.license = self.license
        return source


@dataclass(frozen=True)
class _DomainTree:
    """A folder of domains: their names, all their classes, and per file its domain, class and, if there are folders of splits, split."""

    images: ImageFiles
    names: tuple[str, ...]
    classes: tuple[str, ...]
    domains: Tensor
    labels: Tensor
    splits: tuple[Split, ...] | None = None

    def split_folders(self, with_test: bool) -> dict[Split, Tensor]:
        """Per split with folders of its own which files lie in them, bool.

        Args:
            with_test: whether there are test images already, so that ``val`` need not be the test.
        """
        found = {split: torch.tensor([own == split for own in self.splits or ()]) for split in SPLIT_NAMES}
        present = {split: files for split, files in found.items() if bool(files.any())}
        if not with_test and "test" not in present and "val" in present:
            present["test"] = present.pop("val")
        return present

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
    level, splits = _level_of_splits([folder.split("/") for folder in folders], root), None
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
        splits = tuple(split for number in of_file[kept].tolist() if (split := found[number]) is not None)

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
