"""Fashion-MNIST, whole: 60,000 training and 10,000 test images of clothes, 28×28, grayscale."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.source import SourceConfig
from ssl_pipeline.data.splits import Split, draw_name, stratified_split

_IDX_BYTES = bytes([0, 0, 8])  # how an IDX file of bytes begins
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Config(SourceConfig):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT license.

    Attributes:
        path: a folder with the four idx files, gzipped or not; null downloads them by torchvision.
        download_to: where a download is kept.
        val: training images held out for choices.
    """

    path: str | None = None
    download_to: str = "~/.cache/ssl_pipeline"
    val: int = Field(5000, ge=1, le=30_000)

    def open(self, split: Split) -> ArrayDataset:
        """A split; ``val`` is the same for every seed.

        Raises:
            ConfigError: the files are missing, damaged or can't be downloaded.
        """
        if self.path is None:
            folder = _download(Path(self.download_to).expanduser())
        else:
            folder = existing_folder(self.path, "data.path", "the four idx files")
        return read_splits("fashion_mnist", folder, self.val)[split]


def _download(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST  # here, because the embedded source passes by and needs none of it

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError
        raise ConfigError(
            f"Fashion-MNIST can't be downloaded to {str(root)!r} ({error}). Copy its four idx files to a folder and give "
            "`data.path=FOLDER`, or use the subset that is here already: `data=embedded`."
        ) from error
    return root.resolve()


@lru_cache(maxsize=2)
def read_splits(name: str, folder: Path, val: int) -> dict[Split, ArrayDataset]:
    """All splits of a folder of idx files, each with the mean and standard deviation of ``train``.

    ``val`` training images are held out, evenly over the classes; the source's name names their draw too.

    Raises:
        ConfigError: a file is missing, damaged or not what its name says.
    """
    every, test = (_read_part(name, folder, part) for part in ("train", "t10k"))
    assert every.labels is not None
    if val >= len(every):
        raise ConfigError(f"`data.val` is {val}, and {str(folder)!r} holds {len(every)} training images: give fewer.")
    rest, held_out = stratified_split(every.labels, val, name, draw_name("val"))
    splits: dict[Split, ArrayDataset] = {"train": every.select(rest), "val": every.select(held_out), "test": test}
    mean, std = splits["train"].statistics()
    for source in splits.values():
        source.mean, source.std = mean, std
    return splits


def _read_part(name: str, folder: Path, part: str) -> ArrayDataset:
    paths = [find_idx(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    pixels, labels = (read_idx(path) for path in paths)
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or len(labels) == 0 or int(labels.max()) >= len(CLASSES):
        raise ConfigError(
            f"{paths[0]} holds {tuple(pixels.shape)} and {paths[1]} {tuple(labels.shape)}: they must be N images and N "
            f"labels from 0 to {len(CLASSES) - 1}. Copy Fashion-MNIST's four files anew."
        )
    return ArrayDataset(name, pixels[:, None], labels.long(), CLASSES, "MIT")


def find_idx(folder: Path, name: str) -> Path:
    """The file of a name, gzipped or not, in a folder or where torchvision would put it.

    Raises:
        ConfigError: it is not there.
    """
    for place in (folder, folder / "FashionMNIST" / "raw", folder / "raw"):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise ConfigError(
        f"{str(folder)!r} holds no {name} (.gz or not): `data.path` must be a folder with the four idx files."
    )


def read_idx(path: Path) -> Tensor:
    """Reads one array of bytes.

    Returns:
        uint8 of the shape that the file declares.

    Raises:
        ConfigError: it is no whole IDX file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} can't be read ({error}): it is missing or damaged. Copy it anew.") from error
    if len(data) < 4 or data[:3] != _IDX_BYTES:
        raise ConfigError(
            f"{path} is no IDX file of bytes: it should begin with 00 00 08, and begins with {data[:3].hex(' ') or 'nothing'}."
        )
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ConfigError(f"{path} ends within its header: it is cut off. Copy it anew.")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise ConfigError(
            f"{path} declares {math.prod(shape)} bytes and holds {len(data) - start}: it is cut off or damaged. Copy it anew."
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).copy()).reshape(shape)
