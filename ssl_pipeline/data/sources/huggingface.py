"""Datasets of Hugging Face's ``datasets``: of the hub, of local files, or streamed."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import BadFiles, Limit, parse_limit, warn_once
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.encoded import Sample
from ssl_pipeline.data.hf_dataset import ColumnNames, HFDataset, HFIterableDataset, encoded, numbers
from ssl_pipeline.data.reading import channels_of
from ssl_pipeline.data.source import LOOKED_AT, HoldOutConfig, Images, StreamConfig
from ssl_pipeline.data.splits import Part, Split, split_named

if TYPE_CHECKING:
    from datasets import Dataset


class Config(StreamConfig, HoldOutConfig):
    """A dataset of Hugging Face.

    Attributes:
        path: a name on the hub (``uoft-cs/cifar10``), a folder of files (Parquet, images, …), a folder that
            ``save_to_disk`` wrote, a file (``photos.parquet``), or a kind of files (``parquet``, ``imagefolder``) with ``data_files``.
        subset: the dataset's configuration, where it has several.
        data_files: files or patterns, where ``path`` is a kind of files.
        revision: the version on the hub.
        streaming: read it from front to back instead of storing it whole; shuffled and resumed by position.
        train_split: what is trained on, such as ``train+unsupervised``. If there is no ``train``, the split of a similar name is
            (:data:`~ssl_pipeline.data.splits.SPLIT_NAMES`).
        val_split: labeled images for choices; ``auto``: the split ``validation``, or of a similar name; null
            or none: images of ``train_split`` are held out, or of a stream there is no val.
        test_split: labeled images for the final results; ``auto``: the split ``test``, or of a similar name; null or none: as for val.
        image: the images' column; ``auto``: the one of images.
        label: the labels' column; ``auto``: the one of class labels, or ``label``; null reads none.
        domain: the column that says where an image is from; null: none.
        max_bad_files: how many undecodable images a run goes on with (not in streams), ``20`` or ``1%`` of all: a neighbor
            takes the place of each. More stop the run, with a list.
    """

    path: str
    subset: str | None = None
    data_files: str | tuple[str, ...] | None = None
    revision: str | None = None
    streaming: bool = False
    train_split: str = "train"
    val_split: str | None = "auto"
    test_split: str | None = "auto"
    image: str = "auto"
    label: str | None = "auto"
    domain: str | None = None
    max_bad_files: Limit = parse_limit("1%")

    def open_stream(self, split: Split = "train") -> HFIterableDataset | None:
        named = _train_split(self) if split == "train" else self._named(split)
        return _stream(self, named) if self.streaming and named is not None else None

    def has_split(self, split: Split) -> bool:
        return self._named(split) is not None

    def read_images(self) -> Images:
        train = _rows(self, _train_split(self))
        own: dict[Split, str | None] = {"val": self._named("val"), "test": self._named("test")}
        return Images(
            train, train.labels, {part: partial(_rows, self, name) for part, name in own.items() if name is not None}
        )

    def open_part(self, part: Part, unlabeled: bool = False) -> IndexedDataset | None:
        if self.streaming:
            return StreamConfig.open_part(self, part)
        rows = HoldOutConfig.open_part(self, part, unlabeled)
        if rows is None:
            return None
        index = torch.arange(len(rows))
        if rows.labels is not None and part in ("val", "test") and not unlabeled:
            index = (rows.labels >= 0).nonzero()[:, 0]
            if len(index) == 0:
                raise ConfigError(
                    f"{rows.name} keeps its labels to itself, so nothing can be measured on it: name another by "
                    f"`data.{part}_split`, or null to hold images out."
                )
        rows = rows.select(index)  # a copy with a count of its own: a split is opened once for all runs of a process
        rows.bad_files = BadFiles(self.max_bad_files, len(rows))
        return rows

    def _named(self, split: Split) -> str | None:
        """The dataset's own split that plays a part; None where images are held out for it."""
        given: str | None = getattr(self, f"{split}_split")
        if given != "auto":
            return given
        return _meant_splits(self).get(split)


def _open_split(config: Config, split: str, streaming: bool) -> tuple[str, Any, Any, ColumnNames]:
    """A split's name for messages, its rows with images not decoded, its features and its columns."""
    datasets = import_datasets()
    name, rows = f"{config.path}/{split}", _load(config, split, streaming)
    features = rows.features
    if features is None:  # files that don't declare what they hold: the first row tells
        features = dict.fromkeys(next(iter(rows), {}))
    columns = _columns(config, features, name)
    if isinstance(features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    return name, rows, features, columns


@lru_cache(maxsize=8)
def _rows(config: Config, split: str) -> HFDataset:
    """A split of the dataset, whole, opened once in the process's life."""
    name, rows, _, columns = _open_split(config, split, streaming=False)
    if len(rows) == 0:
        raise ConfigError(f"{name} has no rows.")
    train_split = _train_split(config)
    train = _rows(config, train_split) if split != train_split else None
    channels = config.channels or (train.channels if train else _channels(rows, columns.image, name))
    found = HFDataset(name, rows, columns.image, channels)
    if columns.label is not None:
        found.labels, found.classes = numbers(rows, columns.label, train.classes if train else None)
    if columns.domain is not None:
        found.domains, found.domain_names = numbers(rows, columns.domain, train.domain_names if train else None)
    return found


def _channels(rows: Dataset, image: str, name: str) -> int:
    """What images spread over the whole split say: they may be sorted."""
    places = sorted({i * len(rows) // LOOKED_AT for i in range(LOOKED_AT)})
    looked_at = list[Sample]()
    for place, cell in zip(places, rows.select(places)[:][image], strict=True):
        row = f"{name}/row {place}"
        try:
            looked_at.append(Sample(place, encoded(cell, row), None, row))
        except DecodeError:  # reported when its turn comes
            continue
    return channels_of(looked_at or [Sample(0, b"", None, f"{name}/row 0")])


def _stream(config: Config, split: str) -> HFIterableDataset:
    """A split of the dataset, read from front to back."""
    name, rows, features, columns = _open_split(config, split, streaming=True)
    classes = None if columns.label is None else getattr(features[columns.label], "names", None)
    stream = HFIterableDataset(name, rows, columns, tuple(classes) if classes else None)
    declared = (rows.info.splits or {}).get(split)
    stream.length = (declared.num_examples or None) if declared else None
    return config.configured(stream)


def import_datasets() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "Hugging Face's datasets are read by its library, which is not installed: pip install -e \".[hf]\" in the project's folder."
        ) from error
    return datasets


@lru_cache(maxsize=8)
def _meant_splits(config: Config) -> dict[Split, str]:
    """The dataset's own splits by what their names say; those that nothing reads are said."""
    if _saved(config):
        there = [path.name for path in Path(config.path).expanduser().iterdir() if path.is_dir()]
    else:
        there = list(_asked(config, import_datasets().get_dataset_split_names))
    meant: dict[Split, str] = {}
    for name in sorted(there, key=lambda name: name != "validation"):
        split = split_named(name)
        if split is not None:
            meant.setdefault(split, name)
    given = (config.train_split, config.val_split, config.test_split)
    read = set(meant.values()).union(*(str(name).split("+") for name in given))
    others = [name for name in there if name not in read]
    if others:
        warn_once(
            f"{config.path}: {joined(others)} of its splits {joined(there)} are not used: see `data.train_split`, "
            "`data.val_split` and `data.test_split`."
        )
    return meant


def _train_split(config: Config) -> str:
    return _meant_splits(config).get("train", "train") if config.train_split == "train" else config.train_split


def _load(config: Config, split: str, streaming: bool = False) -> Any:
    datasets = import_datasets()
    if not _saved(config):
        return _asked(config, datasets.load_dataset, split=split, streaming=streaming)
    try:
        saved = datasets.load_from_disk(str(Path(config.path).expanduser()))
    except Exception as error:  # as below
        raise ConfigError(f"`data.path`: {config.path!r} can't be loaded: {error}") from error
    splits = {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    if split not in splits:
        raise ConfigError(f"`data.path`: {config.path!r} has no split {split!r}; it has {', '.join(splits)}.")
    rows = splits[split]
    return rows.to_iterable_dataset(num_shards=max(1, min(64, len(rows) // 64))) if streaming else rows


def _saved(config: Config) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    folder = Path(config.path).expanduser()
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _asked(config: Config, function: Any, **keys: Any) -> Any:
    """What the library says to the dataset's name, or why it can't."""
    path = Path(config.path).expanduser()
    files = list(config.data_files) if isinstance(config.data_files, tuple) else config.data_files
    name = str(path) if path.exists() else config.path
    if path.is_file() and files is None:
        name, files = _kind_of(path), str(path)
    named = [files] if isinstance(files, str) else files or []
    if config.path == "pandas" or any(PurePath(name).suffix.lower() in (".pkl", ".pickle") for name in named):
        raise ConfigError(
            "`data.path`: pickles can run code, so none is read (the library's `pandas` files are): convert them to Parquet."
        )
    try:
        return function(name, config.subset, data_files=files, revision=config.revision, **keys)
    except Exception as error:  # its own, pyarrow's, the network's
        raise ConfigError(
            f"`data.path`: the dataset {config.path!r} can't be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Without a network give a folder of files, or one that `save_to_disk` wrote."
        ) from error


def _kind_of(path: Path) -> str:
    """The library's name for files of an ending: it takes a file's own path for a dataset's script."""
    kinds = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(
            f"`data.path`: {str(path)!r} is a file that ends in none of {', '.join(kinds)}: give such a file, or a folder of them."
        )
    return kind


def _columns(config: Config, features: Any, name: str) -> ColumnNames:
    """The columns that the configuration names, or that their types give away."""
    datasets = import_datasets()
    named = ", ".join(map(repr, features))
    for key in ("image", "label", "domain"):
        column = getattr(config, key)
        if column not in (None, *features) and (column != "auto" or key == "domain"):
            raise ConfigError(f"{name} has no column {column!r}; it has {named}: mend `data.{key}`.")
    images, classes = (
        [column for column, kind in features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    image, label = config.image, config.label
    if image == "auto":
        if len(images) != 1:
            raise ConfigError(
                f"{name} has {len(images)} columns of images; its columns are {named}: name the right one by `data.image`."
            )
        image = images[0]
    if label == "auto":
        label = classes[0] if len(classes) == 1 else "label" if "label" in features else None
    return ColumnNames(image, label, config.domain)
