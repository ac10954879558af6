"""The classification datasets of torchvision, by name."""

from __future__ import annotations

import hashlib
import inspect
import logging
import pickle
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision import datasets

from ssl_pipeline.config.base import ConfigError, closest
from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.decode import DecodeError, at_range, is_grayscale
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.source import HoldOutConfig, Images
from ssl_pipeline.data.splits import Split

# The argument that chooses a part, and its value for each split that the dataset has; where the labels of a test part are
# not published, the validation part is the test.
_FLAG: dict[Split, Any] = {"train": True, "test": False}
_TWO: dict[Split, Any] = {"train": "train", "test": "test"}
_THREE: dict[Split, Any] = {"train": "train", "val": "val", "test": "test"}
_VALIDATED: dict[Split, Any] = {"train": "train", "test": "val"}
_WHOLE: dict[Split, Any] = {}
_NO_PARTS = ("Caltech101", "Caltech256", "EuroSAT", "FakeData", "ImageFolder", "INaturalist", "SEMEION", "SUN397")
DATASETS: dict[str, dict[Split, Any]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "EMNIST", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _FLAG),
    **dict.fromkeys(("Food101", "GTSRB", "StanfordCars", "SVHN"), _TWO),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _THREE),
    **dict.fromkeys(("ImageNet", "Imagenette"), _VALIDATED),
    **dict.fromkeys(_NO_PARTS, _WHOLE),
    "Country211": {"train": "train", "val": "valid", "test": "test"},
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
    "Places365": {"train": "train-standard", "test": "val"},
    "STL10": {"train": "train+unlabeled", "test": "test"},
}
_log = logging.getLogger("ssl_pipeline")


class Config(HoldOutConfig):
    """A dataset of torchvision; it is read where torchvision would put it.

    CIFAR's files are pickles; torchvision loads them only if their checksum is the published one.

    Attributes:
        dataset: its name, such as ``CIFAR10``, ``STL10``, ``Flowers102``, ``ImageFolder``.
        path: the folder that torchvision calls ``root``.
        download: whether torchvision may fetch what is missing.
        options: further arguments of its class, such as ``{split: letters}`` for EMNIST.
        channels: 3 for RGB, 1 for grayscale; null: as of the first image.
    """

    dataset: str
    path: str = "~/.cache/ssl_pipeline"
    download: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    channels: Literal[1, 3] | None = None

    def read_images(self) -> Images:
        parts, settings = _parts(self), self.model_dump_json()
        train = _part(settings, "train")

        def open_own(split: Split) -> IndexedDataset:
            own = _part(settings, split)
            own.mean, own.std = train.mean, train.std
            return own

        return Images(train, train.labels, {split: partial(open_own, split) for split in parts if split != "train"})


def _parts(config: Config) -> dict[Split, dict[str, Any]]:
    """Per split that the dataset has of its own, the arguments that choose it; given ones choose one part alone."""
    parts = DATASETS.get(config.dataset)
    if parts is None:
        names = {name.lower(): name for name in DATASETS}
        close = None if hasattr(datasets, config.dataset) else closest(config.dataset.lower().replace("-", ""), names)
        hint = f"Did you mean `data.dataset={names[close]}`? " if close else ""
        raise ConfigError(
            f"`data.dataset`: {config.dataset!r} is no dataset of torchvision with one class per image. {hint}Known: "
            f"{', '.join(sorted(DATASETS))}."
        )
    key = "train" if parts == _FLAG else "split"
    if not parts or key in config.options:
        return {"train": {}}
    return {split: {key: value} for split, value in parts.items()}


@lru_cache(maxsize=4)
def _part(settings: str, split: Split) -> IndexedDataset:
    """A part of the dataset, whole, opened once in the process's life."""
    config = Config.model_validate_json(settings)
    found = _make(getattr(datasets, config.dataset), config, _parts(config)[split])
    if len(found) == 0:
        raise ConfigError(f"torchvision's {config.dataset} has no images in its folder.")
    labels, classes = _labels(found, config.dataset)
    name, pixels, samples = f"torchvision {config.dataset}", _pixels(found), getattr(found, "samples", None)
    source: IndexedDataset
    if pixels is not None and config.channels in (None, pixels.shape[1]):
        source = ArrayDataset(name, pixels, labels, classes)
        source.mean, source.std = source.statistics()
    elif samples is not None:  # files of its own: decoded as those of a folder
        root = Path(found.root)
        files = [str(path).removeprefix(f"{root}/") for path, _ in samples]
        source = FileDataset(name, root.resolve(), files, config.channels or 3, labels, classes)
    else:
        source = TorchvisionDataset(name, found, config.channels, labels, classes)
    return source


def _make(made_by: Any, config: Config, part: dict[str, Any]) -> Any:
    parameters = inspect.signature(made_by).parameters
    root = Path(config.path).expanduser()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {**({"root": str(root)} if "root" in parameters else {}), **part, **config.options}
    if config.download:
        if "download" not in parameters and not takes_any:
            raise ConfigError(
                f"`data.download`: torchvision can't fetch {config.dataset}: put it into {str(root)!r} yourself."
            )
        arguments["download"] = True
    unknown = [key for key in config.options if key not in parameters and not takes_any]
    if unknown:
        raise ConfigError(
            f"`data.options`: {config.dataset} takes no {', '.join(map(repr, unknown))}; it takes {', '.join(parameters)}."
        )
    try:
        return made_by(**arguments)
    except ImportError as error:
        raise ConfigError(f"{config.dataset} needs a further package: {error}") from error
    except (OSError, RuntimeError, HTTPException, ValueError, TypeError, pickle.PickleError) as error:
        raise ConfigError(
            f"{config.dataset} can't be read from {str(root)!r}: {error}. Give `data.path`, the folder that torchvision calls "
            "`root`, or `data.download=true`."
        ) from error


def _labels(found: Any, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """One class per image, int64, and the classes' names; torchvision keeps them under several names."""

    def first(*keys: str) -> Any:
        return next((value for key in keys if (value := getattr(found, key, None)) is not None), None)

    values, rows = first("targets", "labels", "_labels", "y"), first("samples", "_samples")
    if name == "INaturalist":
        values = [category for category, _ in found.index]
    elif values is None and rows is None:
        _log.info("%s keeps its labels with the images: all %d are read once", name, len(found))
        values = [found[i][1] for i in range(len(found))]
    labels = torch.as_tensor(np.asarray([label for _, label in rows] if values is None else values)).long()
    names = first("classes", "categories", "all_categories") or range(int(labels.max()) + 1)
    return labels, tuple(" / ".join(name) if isinstance(name, (tuple, list)) else str(name) for name in names)


def _pixels(found: Any) -> Tensor | None:
    """All images, uint8 of shape (N, C, H, W), of datasets that hold them in memory."""
    data = getattr(found, "data", None)
    pixels = torch.as_tensor(data) if isinstance(data, (np.ndarray, Tensor)) else torch.empty(0)
    if pixels.dtype != torch.uint8 or len(pixels) != len(found) or pixels.ndim not in (3, 4):
        return None
    if pixels.ndim == 3:
        return pixels[:, None]
    return pixels if pixels.shape[1] in (1, 3) else pixels.permute(0, 3, 1, 2).contiguous()


class TorchvisionDataset(IndexedDataset):
    """A dataset of torchvision that decodes its images itself."""

    def __init__(
        self, name: str, dataset: Any, channels: int | None, labels: Tensor | None, classes: tuple[str, ...] | None
    ) -> None:
        self.name, self.labels, self.classes, self._dataset = name, labels, classes, dataset
        self._index = torch.arange(len(dataset))
        if channels is None:
            image = dataset[0][0]
            if not isinstance(image, Image.Image):
                raise ConfigError(f"{name} gives {type(image).__name__} rather than images: take another dataset.")
            channels = 1 if is_grayscale(image.mode) else 3
        self.channels = channels

    def __len__(self) -> int:
        return len(self._index)

    def open_image(self, index: int) -> Image.Image:
        """The decoded image.

        Raises:
            DecodeError: naming the sample.
        """
        try:
            image = self.open_stored(index)
        except (OSError, SyntaxError, ValueError) as error:
            raise DecodeError(Path(self.describe(index)), str(error).rstrip(".")) from error
        return at_range(image, "L" if self.channels == 1 else "RGB", self.value_range)

    def open_stored(self, index: int) -> Image.Image:
        image: Image.Image = self._dataset[int(self._index[index])][0]
        return image

    def fingerprint(self) -> str:
        """Of the dataset's name and size, and of the chosen samples and labels."""
        digest = hashlib.blake2b(f"{self.name}\0{len(self._dataset)}".encode(), digest_size=16)
        for numbers in (self._index, self.labels):
            digest.update(b"" if numbers is None else numbers.numpy().tobytes())
        return digest.hexdigest()

    def select(self, index: Tensor) -> Self:
        chosen = super().select(index)
        chosen._index = self._index[index]
        return chosen
