"""Datasets of Hugging Face's ``datasets``: of the hub, of local files, or streamed."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import BadFiles, Limit, parse_limit, warn_once
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.encoded import InMemoryDataset, Sample
from ssl_pipeline.data.hf_dataset import ColumnNames, HFDataset, HFIterableDataset, encoded, numbers
from ssl_pipeline.data.reading import channels_of
from ssl_pipeline.data.source import LOOKED_AT, Part, Split, StreamConfig
from ssl_pipeline.data.splits import part_of, split_named, split_three

if TYPE_CHECKING:
    from datasets import Dataset


class Config(StreamConfig):
    """A dataset of Hugging Face.

    Attributes:
        path: a name on the hub (``uoft-cs/cifar10``), a folder of files (Parquet, images, …), a folder that
            ``save_to_disk`` wrote, a file (``photos.parquet``), or a kind of files (``parquet``, ``imagefolder``) with ``data_files``.
        subset: the dataset's configuration, where it has several.
        data_files: files or patterns, where ``path`` is a kind of files.
        revision: the version on the hub.
        streaming: read it from front to back instead of storing it whole; shuffled and resumed by position.
        train_split: what is trained on, such as ``train+unsupervised``. Where there is no ``train``, the one of a like name is
            (:data:`~ssl_pipeline.data.splits.SPLIT_NAMES`).
        val_split: labeled images for choices; ``auto``: the split ``validation``, or of a like name, where there is one; null
            or none: images of ``train_split`` are held out, or of a stream there is no val.
        test_split: for the final figures; ``auto``: the split ``test``; otherwise likewise.
        image: the images' column; ``auto``: the one of images.
        label: the labels' column; ``auto``: the one of class labels, or ``label``; null reads none.
        domain: the column that says where an image is from; null: none.
        channels: 3 for RGB, 1 for grayscale; null: 1 where images all over the split are all grayscale.
        val: the share of labeled training images that is held out for choices where there is no ``val_split``.
        test: the share held out for the final figures, likewise.
        length: images of a stream, where the dataset does not declare it.
        shuffle_buffer: images of a stream that a process holds to deal them out in a random order.
        max_val_images: most images of a stream's ``val`` and ``test`` that are read, into memory.
        on_error: an image of a stream that can't be decoded ``stop`` the run, or is left out (``skip``).
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
    channels: Literal[1, 3] | None = None
    val: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    length: int | None = Field(None, ge=2)
    shuffle_buffer: int = Field(4096, ge=1)
    max_val_images: int = Field(5000, ge=1)
    on_error: Literal["stop", "skip"] = "stop"
    max_bad_files: Limit = parse_limit("1%")

    def open_stream(self) -> HFIterableDataset | None:
        """The training images, if they are streamed."""
        return _stream(self, _train_split(self)) if self.streaming else None

    def open_part(self, part: Part) -> IndexedDataset | None:
        """All rows of ``train_split`` but those of the test, or a split of them; ``val`` and ``test`` need labels.

        Raises:
            ConfigError: the dataset can't be loaded, has no such split or column, or is streamed and its training images
                are asked for.
        """
        named = None if part == "train" or part == "pool" else self._named(part)
        if self.streaming:
            if part == "train" or part == "pool":
                raise self.refuse_numbers()
            return None if named is None else _held(self, named)
        train = _rows(self, _train_split(self))
        if part not in ("train", "pool") and train.labels is None:
            return None
        return self._share(train, part) if named is None else self._bearing(_labeled(_rows(self, named), part))

    def open_parts(self) -> dict[Split, IndexedDataset]:
        """All rows by their splits, those whose labels are kept back too."""
        if self.streaming:
            raise self.refuse_numbers()
        train = _rows(self, _train_split(self))
        splits: tuple[Split, ...] = ("train", "val", "test")
        own: dict[Split, str] = {
            split: name for split in splits if split != "train" and (name := self._named(split)) is not None
        }
        drawn = {split for split in splits if split not in own and (split == "train" or train.labels is not None)}
        return {
            split: self._share(train, split) if split in drawn else self._bearing(_rows(self, own[split]))
            for split in splits
            if split in drawn or split in own
        }

    def _share(self, train: HFDataset, split: Part) -> HFDataset:
        """A share of the training rows."""
        if train.labels is None:
            return self._bearing(train.select(torch.arange(len(train))))
        test, val = (None if self._named("test") else self.test), (None if self._named("val") else self.val)
        shares = split_three(train.labels, test, val, "huggingface")
        return self._bearing(part_of(train, shares, split))

    def _bearing(self, rows: HFDataset) -> HFDataset:
        """Rows with a count of their own: the split itself is opened once for all runs of a process."""
        rows = rows.select(torch.arange(len(rows)))
        rows.bad_files = BadFiles(self.max_bad_files, len(rows))
        return rows

    def _named(self, split: Split) -> str | None:
        """The dataset's own split that plays a part; None where images are held out for it."""
        given: str | None = getattr(self, f"{split}_split")
        if given != "auto":
            return given
        return _meant_splits(self).get(split)


def _labeled(rows: HFDataset, split: str) -> HFDataset:
    assert rows.labels is not None
    if bool((rows.labels < 0).all()):
        raise ConfigError(
            f"{rows.name} keeps its labels to itself, so nothing can be measured on it: name another by `data.{split}_split`, "
            "or null to hold images out."
        )
    return rows.select((rows.labels >= 0).nonzero()[:, 0])


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
    stream.length = config.length or (declared.num_examples if declared else None) or None
    stream.block, stream.skip_unreadable = config.shuffle_buffer, config.on_error == "skip"
    first = list(itertools.islice(stream.read(0), LOOKED_AT))
    if not first:
        raise ConfigError(f"{name} has no rows in its first shard.")
    stream.channels = config.channels or channels_of(first)
    return stream


@lru_cache(maxsize=4)
def _held(config: Config, split: str) -> InMemoryDataset:
    channels = config.channels or _stream(config, _train_split(config)).channels  # of the images that the network reads
    held = _stream(config.model_copy(update={"channels": channels}), split).preview(config.max_val_images)
    if held.labels is None:
        raise ConfigError(
            f"{held.name} has images without a label, and nothing can be measured on them: name another split."
        )
    return held


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
def _split_names(config: Config) -> tuple[str, ...]:
    datasets = import_datasets()
    if _saved(config):
        return tuple(path.name for path in Path(config.path).expanduser().iterdir() if path.is_dir())
    return tuple(_asked(config, datasets.get_dataset_split_names))


@lru_cache(maxsize=8)
def _meant_splits(config: Config) -> dict[Split, str]:
    """The dataset's own splits by what their names say; those that nothing reads are said."""
    there = _split_names(config)
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
        return function(
            name,
            config.subset,
            data_files=files,
            revision=config.revision,
            **keys,
        )
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
