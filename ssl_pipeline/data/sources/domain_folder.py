"""A folder of domains, each a folder of classes: ``domain/class/image``, as of PACS, Office-Home or DomainNet.

Splits may be folders, too: ``train/domain/class/image`` or ``domain/train/class/image``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFilesLimit
from ssl_pipeline.data.file_source import FileDataset
from ssl_pipeline.data.files import as_text
from ssl_pipeline.data.prepared import ImageFiles, PreparedConfig, scan_folder
from ssl_pipeline.data.source import Part, Split
from ssl_pipeline.data.splits import SPLIT_NAMES, part_of, resembles_split, split_named, split_three, splits_among
from ssl_pipeline.data.verdicts import listed, warn_once


class Config(PreparedConfig[FileDataset]):
    """Images of the same classes from several domains.

    Classes and domains are numbered over the whole folder, so that a number means the same whichever domains are chosen.
    Folders of splits (``train`` with ``val`` or ``test``, above the domains or in each of them) are read as such; without
    ``test``, ``val`` is the test unless there are ``test_domains``.

    Attributes:
        path: the folder. Nothing in it is changed.
        domains: those to train on; null takes all that are not in ``test_domains``.
        test_domains: domains that are for the final figures alone, whole; null holds images of ``domains`` out.
        dev: the share of the training domains' images that is held out for choices, evenly over domains and classes.
        test: the share that is held out for the final figures where there are no ``test_domains``.
        license: of the images, where you know it.
    """

    path: str
    domains: tuple[str, ...] | None = None
    test_domains: tuple[str, ...] | None = None
    dev: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    license: str | None = None

    def open_part(self, part: Part) -> FileDataset:
        """A split, or all images of the training domains but those of the test.

        Raises:
            ConfigError: the folder is missing or is not ``domain/class/image``, holds too many bad files, or a domain is not
                in it.
        """
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"`data.path`: there is no folder {self.path!r}: give the folder that holds the domains.")
        tree = _scan(root.resolve(), self.bad_files, self.base)
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
        if part == "test" and test:
            self._refuse_unseen_classes(tree, train, test)
            return self._source(tree, tree.files_of(test))
        folders = tree.split_folders(with_test=bool(test))
        pool = tree.files_of(train)
        if folders is not None:
            if part != "train" and part != "pool" and part in folders:
                return self._source(tree, pool[folders[part][pool]])
            pool = pool[folders["train"][pool]]
        # Numbered by domain and class, so that each of both is held out in proportion.
        cells = tree.domains[pool] * len(tree.classes) + tree.labels[pool]
        own = folders or {}
        shares = split_three(
            cells, None if test or "test" in own else self.test, None if "dev" in own else self.dev, "domain folder"
        )
        return part_of(self._source(tree, pool), shares, part)

    def _source(self, tree: _Tree, index: Tensor) -> FileDataset:
        source = tree.images.source(
            self, str(tree.images.root), labels=tree.labels, classes=tree.classes, domains=tree.domains,
            domain_names=tree.names,
        ).select(index)  # fmt: skip
        source.license = self.license
        return source

    def _refuse_unseen_classes(self, tree: _Tree, train: list[int], test: list[int]) -> None:
        of_train, of_test = (set(tree.labels[tree.files_of(domains)].tolist()) for domains in (train, test))
        unseen = [tree.classes[label] for label in sorted(of_test - of_train)]
        if unseen:
            raise ConfigError(
                f"`data.test_domains`: the classes {', '.join(unseen[:10])} ({len(unseen)} in all) are in no training domain, "
                "so nothing could learn them: leave their folders out, or train on another domain."
            )


@dataclass(frozen=True)
class _Tree:
    """What a folder of domains holds.

    Attributes:
        images: its files.
        names: of the domains.
        classes: of all domains together.
        domains: per file its domain, int64.
        labels: per file its class, int64.
        splits: per file the split whose folder it lies in; None where there are no such folders.
    """

    images: ImageFiles
    names: tuple[str, ...]
    classes: tuple[str, ...]
    domains: Tensor
    labels: Tensor
    splits: tuple[Split, ...] | None = None

    def split_folders(self, with_test: bool) -> dict[Split, Tensor] | None:
        """Per split which files lie in its folders, bool; None where there are none.

        Args:
            with_test: whether there are test images already, so that ``val`` need not be the test.
        """
        if self.splits is None:
            return None
        found = {split: torch.tensor([own == split for own in self.splits]) for split in SPLIT_NAMES}
        present = {split: files for split, files in found.items() if bool(files.any())}
        if not with_test and "test" not in present and "dev" in present:
            present["test"] = present.pop("dev")
        return present

    def numbers(self, wanted: tuple[str, ...], key: str) -> list[int]:
        """The numbers of domains by name."""
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            raise ConfigError(
                f"`data.{key}`: {str(self.images.root)!r} has no domain {', '.join(map(repr, unknown))}. Its domains: "
                f"{', '.join(self.names)}."
            )
        return [self.names.index(name) for name in wanted]

    def files_of(self, domains: list[int]) -> Tensor:
        """The files of some domains, a sorted int64 index."""
        return torch.isin(self.domains, torch.tensor(domains, dtype=torch.int64)).nonzero()[:, 0]


@lru_cache(maxsize=4)
def _scan(root: Path, limit: BadFilesLimit, base: Path | None) -> _Tree:
    """Reads a folder once in the process's life."""
    images = scan_folder(root, base, limit, depth=2)
    if not images.files:
        raise ConfigError(
            f"`data.path`: {str(root)!r} holds no image at domain/class/image. For a folder of classes without domains take "
            "`data=folder`."
        )
    images.refuse_lost_folders(levels=2)
    column = images.files.column("folder")
    assert column is not None
    used, of_file = column.unique(return_inverse=True)
    paths = [as_text(images.folders[folder]).split("/") for folder in used.tolist()]
    level = _level_of_splits(paths, root)
    splits = None
    if level is not None:
        deep = [len(path) >= 3 and split_named(path[level]) is not None for path in paths]
        images, of_file = _kept(images, of_file, deep)
        splits = tuple(split_named(paths[folder][level]) or "train" for folder in of_file.tolist())
        paths = [path[:level] + path[level + 1 :] if kept else ["", ""] for path, kept in zip(paths, deep, strict=True)]
    pairs = [(paths[folder][0], paths[folder][1]) for folder in of_file.unique().tolist()]
    names, class_names = (tuple(sorted(set(column))) for column in zip(*pairs, strict=True))
    return _Tree(
        images, names, class_names,
        torch.tensor([names.index(path[0]) if path[0] in names else -1 for path in paths])[of_file],
        torch.tensor([class_names.index(path[1]) if path[1] in class_names else -1 for path in paths])[of_file],
        splits,
    )  # fmt: skip


def _level_of_splits(paths: list[list[str]], root: Path) -> int | None:
    """Which level of the folders is that of splits: 0 above the domains, 1 in them; None where there is none."""
    tops, seconds = ({path[level] for path in paths} for level in (0, 1))
    named = splits_among(tops, repr(str(root)))
    if named:
        others = sorted(tops - set(named.values()))
        if others:
            warn_once(f"{root}: not used: {listed(others)}, which are named for no split.")
        return 0
    kinds = {split_named(name) for name in seconds}
    if "train" in kinds and len(kinds) > 1 and None not in kinds:
        return 1
    alike = sorted(name for name in tops | seconds if resembles_split(name))
    if alike:
        warn_once(
            f"{root}: {listed(alike)} look like splits and are taken as domains or classes: splits are `train` with `val` or "
            "`test`, above all domains or in each of them."
        )
    return None


def _kept(images: ImageFiles, of_file: Tensor, folders: list[bool]) -> tuple[ImageFiles, Tensor]:
    """The files of some folders."""
    index = torch.tensor(folders)[of_file].nonzero()[:, 0]
    if len(index) == 0:
        raise ConfigError(
            f"`data.path`: {str(images.root)!r} has folders of splits and holds no image at split/domain/class or "
            "domain/split/class. For splits of classes without domains take `data=folder`."
        )
    return replace(images, files=images.files.select(index)), of_file[index]
