"""A table of image files: CSV, TSV, JSONL or Parquet, one row per image with its path and, perhaps, label, domain and split."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined, shorten
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.columns import alike, class_names, number_names, numbers_in, one_of, read_columns
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.image_files import ImageFiles, PreparedConfig, lookup_files, normal_path
from ssl_pipeline.data.source import Images
from ssl_pipeline.data.splits import SPLIT_NAMES, Split, split_named
from ssl_pipeline.data.targets import NumericTargets

_LIKE_SPLITS = {"subset", "set", "partition", "phase", "usage", "part"}
_log = logging.getLogger("ssl_pipeline")


class Config(PreparedConfig):
    """A table of image files.

    Where ``ssl-pipeline prepare ROOT --data table`` has indexed the folder that the paths start from, its index is used.

    Attributes:
        path: the table: .csv, .tsv, .jsonl or .parquet.
        root: the folder that relative paths start from; null for the table's own.
        path_column: holds the images' paths.
        label_column: holds the classes' names or numbers; ``auto`` is ``label`` where there is such a column, capitals and
            blanks around it aside; null reads none.
            Of several labels of an image one is read, or all as ``target_columns``.
        target_columns: hold numbers beside an image: several labels of 0 and 1, or values to predict; an empty cell is not
            known. With them no label is read.
        domain_column: holds the domains' names; ``auto`` is ``domain`` where there is such a column; null reads none.
        domains: those to take; null takes all. An image is held out or not whichever are chosen.
        split_column: holds train, val and test; ``auto`` is ``split`` where there is such a column; null holds images out.
        on_missing: files that are not there ``stop`` the run before it starts, or their rows are left out (``skip``).
    """

    path: str
    root: str | None = None
    path_column: str = "path"
    label_column: str | None = "auto"
    target_columns: tuple[str, ...] = ()
    domain_column: str | None = "auto"
    domains: tuple[str, ...] | None = Field(None, min_length=1)
    split_column: str | None = "auto"
    on_missing: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _labels_or_targets(self) -> Config:
        if self.target_columns and self.label_column not in (None, "auto"):
            raise ValueError("give `label_column` or `target_columns`, not both.")
        return self

    def read_images(self) -> Images:
        rows = _read(self)
        of_split = dict(rows.of_split)
        images = rows.images.dataset(self, self.path, **rows.known)
        images.unlabeled_because = rows.unlabeled_because
        train = of_split.pop("train", None)
        if train is None:
            raise ConfigError(f"{self.path!r}: no row is of the split `train`, so there is nothing to train on.")
        chosen, strata = self._chosen(images, train), images.labels
        if rows.targets is not None:
            images, strata = (
                images.with_annotations(rows.targets),
                torch.where(rows.targets.values.isnan().all(1), -1, 0),
            )

        def rows_of(index: Tensor) -> IndexedDataset | None:
            index = index[chosen[index]]
            return images.select(index) if len(index) else None

        own = {split: partial(rows_of, index) for split, index in of_split.items()}
        return Images(images.select(train), None if strata is None else strata[train], own, chosen[train])

    def _chosen(self, images: IndexedDataset, train: Tensor) -> Tensor:
        """Which rows are of the chosen domains, bool of shape (N,)."""
        if self.domains is None:
            return torch.ones(len(images), dtype=torch.bool)
        if images.domains is None or images.domain_names is None:
            raise ConfigError(
                f"`data.domains` is given, and {self.path!r} has no column of domains: set `data.domain_column`."
            )
        known = [images.domain_names[number] for number in images.domains[train].unique().tolist()]
        absent = [name for name in self.domains if name not in known]
        if absent:
            raise ConfigError(
                f"`data.domains`: {self.path!r} has no training row of {', '.join(map(repr, absent))}. Its domains: "
                f"{', '.join(known)}."
            )
        return torch.isin(images.domains, torch.tensor([images.domain_names.index(name) for name in self.domains]))


@dataclass(frozen=True)
class _Rows:
    """A table's rows.

    Attributes:
        images: their files.
        of_split: the rows of each split that has some; all are of ``train`` without such a column.
        known: labels, domains and their names, as a dataset takes them; a class that is a number has its place by it.
        targets: the numbers beside them, where such columns are named.
    """

    images: ImageFiles
    of_split: dict[Split, Tensor]
    known: dict[str, Any]
    targets: NumericTargets | None
    unlabeled_because: str | None


@lru_cache(maxsize=4)
def _read(config: Config) -> _Rows:
    """Reads a table once in the process's life."""
    path = Path(config.path).expanduser()
    names, columns_found = dict[str, str](), list[str]()

    def choose(found: Sequence[str]) -> list[str]:
        names["path"] = one_of(config.path_column, found, "path_column", path)
        for kind in ("label", "domain", "split"):
            key = f"{kind}_column"
            wanted = getattr(config, key)
            if wanted == "auto":
                wanted = None if kind == "label" and config.target_columns else alike(kind, found, key, path)
            if wanted is not None:
                names[kind] = one_of(wanted, found, key, path)
        names.update({f"target {name}": one_of(name, found, "target_columns", path) for name in config.target_columns})
        chosen = list(dict.fromkeys(names.values()))
        _say_what_is_not_read([name for name in found if name not in chosen], config, "split" in names)
        columns_found.extend(found)
        return chosen

    columns = read_columns(path, choose)
    by_kind = {kind: columns[name] for kind, name in names.items()}
    root = (path.parent if config.root is None else Path(config.root).expanduser()).resolve()
    images = lookup_files(root, by_kind["path"], config.base)
    there = np.array(_existing(images, by_kind["path"], config), np.int64)
    images = replace(images, files=images.files.select(there))
    there = there[images.files.column("fault") == 0]
    images = images.without_bad(config.max_bad_files)
    kept = {kind: [values[i] for i in there] for kind, values in by_kind.items()}
    every: list[Split] = ["train"] * len(there)
    splits = _splits(kept["split"], names["split"], path) if "split" in kept else every
    _refuse_twice(kept["path"], root, splits, path)
    for kind in {"label", "domain"} & kept.keys():
        kept[kind] = class_names(kept[kind], names[kind], str(path))
    labels, classes = number_names(kept["label"]) if "label" in kept else (None, None)
    if labels is not None and classes is not None:
        _check_labels(labels, classes, splits, names["label"], path)
    numbers = [numbers_in(kept[f"target {name}"], name, path) for name in config.target_columns]
    targets = NumericTargets(torch.tensor(numbers).T.contiguous(), config.target_columns) if numbers else None
    domains, domain_names = number_names(kept["domain"]) if "domain" in kept else (None, None)
    if domains is not None and bool((domains < 0).any()):
        raise ConfigError(
            f"{path}: {int((domains < 0).sum())} rows have no value in {names['domain']!r}: fill them in, or set "
            "`data.domain_column=null`."
        )
    because = None
    if labels is None and not config.target_columns:
        because = f"its columns are {joined(columns_found)}: name the one of classes by `data.label_column=COLUMN`."
    of_split = {
        own: torch.tensor([split == own for split in splits]).nonzero()[:, 0] for own in SPLIT_NAMES if own in splits
    }
    known = {"labels": labels, "classes": classes, "domains": domains, "domain_names": domain_names}
    return _Rows(images, of_split, known, targets, because)


def _say_what_is_not_read(columns: Sequence[str], config: Config, has_splits: bool) -> None:
    """Rows that a column calls test rows would be trained on, if it has a name that is not known."""
    if has_splits or config.split_column is None:
        return
    like = [name for name in columns if name.strip().casefold() in _LIKE_SPLITS or "split" in name.casefold()]
    if like:
        warn_once(
            f"{config.path}: the column {like[0]!r} looks like one of splits and is not read, so images are held out by chance: "
            f"read it by `data.split_column={like[0]}`, or set `data.split_column=null`."
        )


def _existing(images: ImageFiles, files: Sequence[str | None], config: Config) -> list[int]:
    """The rows whose file is there; those that an index knows to be sound are not looked for."""
    root = images.root

    def absent(rows: list[int]) -> list[int]:
        return [i for i in rows if (file := files[i]) is None or not (root / file).is_file()]

    unknown = ((images.files.column("checked") == 0) | (images.files.column("fault") > 0)).nonzero()[0].tolist()
    with ThreadPoolExecutor(8) as pool:  # a network's file system answers many at once
        found = pool.map(absent, (unknown[i : i + 256] for i in range(0, len(unknown), 256)))
        gone = set(itertools.chain.from_iterable(found))
    missing = [str(root / file) if (file := files[i]) else f"row {i + 1}: no path" for i in sorted(gone)]
    if missing and (config.on_missing == "stop" or len(missing) == len(files)):
        raise ConfigError(
            [
                *shorten(missing),
                f"{len(missing)} of the {len(files)} files in {config.path!r} are not there: mend the paths (relative ones start "
                f"from {str(root)!r}, see `data.root`), or set `data.on_missing=skip`.",
            ]
        )
    if missing:
        _log.warning("left out %d rows of %d whose file is not there, such as %s", len(missing), len(files), missing[0])
    return [i for i in range(len(files)) if i not in gone]


def _splits(values: list[str | None], column: str, path: Path) -> list[Split]:
    found = Counter("" if value is None else value for value in values)
    named = {name: split_named(name) for name in found}
    unknown = [name for name, split in named.items() if split is None]
    if unknown:
        listed = joined([f"{name!r} ({found[name]} rows)" for name in unknown])
        known = ", ".join(itertools.chain.from_iterable(SPLIT_NAMES.values()))
        raise ConfigError(
            f"{path}: these splits in {column!r} are not known: {listed}. Known: {known}; or set `data.split_column=null`."
        )
    splits = [named["" if value is None else value] for value in values]
    return [split for split in splits if split is not None]


def _refuse_twice(paths: Sequence[str | None], root: Path, splits: list[Split], path: Path) -> None:
    """A file in two splits would be trained on and measured on."""
    split_of: dict[str, Split] = {}
    repeats = 0
    for given, split in zip(paths, splits, strict=True):
        file = normal_path(str(given), root)
        repeats += file in split_of
        if split_of.setdefault(file, split) != split:
            raise ConfigError(f"{path}: {file} stands in `{split_of[file]}` and in `{split}`: leave it in one of them.")
    if repeats:
        _log.warning("%s names %d files more than once: each row counts as an image", path, repeats)


def _check_labels(labels: Tensor, classes: tuple[str, ...], splits: list[Split], column: str, path: Path) -> None:
    training = torch.tensor([split == "train" for split in splits])
    known = set(labels[training].tolist())
    for split in ("val", "test"):
        own = labels[torch.tensor([other == split for other in splits])]
        unseen = [classes[label] for label in own.unique().tolist() if label >= 0 and label not in known]
        if unseen:
            raise ConfigError(
                f"{path}: rows of `{split}` have labels that no training row has: {joined(unseen)}. "
                "Nothing could learn them: mend the labels, or move rows to `train`."
            )
        if bool((own < 0).any()):
            raise ConfigError(
                f"{path}: {int((own < 0).sum())} rows of `{split}` have no value in {column!r}, and nothing can be measured on "
                "them: fill them in, or leave the rows out."
            )
    without = int((labels < 0).sum())
    if without == len(labels):
        raise ConfigError(f"{path}: no row has a value in {column!r}: fill it in, or set `data.label_column=null`.")
    if without:
        _log.warning("%s: %d of %d rows have no label; stage one learns from them too", path, without, len(labels))
