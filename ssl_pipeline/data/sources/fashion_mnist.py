"""Fashion-MNIST, whole: 60,000 training and 10,000 test images of clothes, 28×28, grayscale."""

from __future__ import annotations

from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

from pydantic import Field

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.idx import find_idx, read_idx
from ssl_pipeline.data.source import SourceConfig, Split
from ssl_pipeline.data.splits import stratified_split

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Config(SourceConfig):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT license.

    Attributes:
        path: a folder with the four idx files, gzipped or not; null downloads them by torchvision.
        download_to: where a download is kept.
        dev: training images held out for choices.
    """

    path: str | None = None
    download_to: str = "~/.cache/ssl_pipeline"
    dev: int = Field(5000, ge=1, le=30_000)

    def open(self, split: Split) -> ArrayDataset:
        """A split; ``dev`` is the same for every seed.

        Raises:
            ConfigError: the files are missing, damaged or can't be downloaded.
        """
        if self.path is None:
            folder = _download(Path(self.download_to).expanduser())
        else:
            folder = Path(self.path).expanduser().resolve()
            if not folder.is_dir():
                what = f"{self.path!r} is a file" if folder.exists() else f"there is no folder {self.path!r}"
                raise ConfigError(f"`data.path`: {what}; it must be a folder with the four idx files.")
        return read_splits("fashion_mnist", folder, self.dev)[split]


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
def read_splits(name: str, folder: Path, dev: int) -> dict[Split, ArrayDataset]:
    """All splits of a folder of idx files.

    Args:
        name: of the source; it names the draw of ``dev`` too.
        folder: the four files, gzipped or not.
        dev: training images held out, evenly over the classes.

    Returns:
        ``train``, ``dev`` and ``test``, each with the mean and standard deviation of ``train``.

    Raises:
        ConfigError: a file is missing, damaged or not what its name says.
    """
    every, test = (_read_part(name, folder, part) for part in ("train", "t10k"))
    assert every.labels is not None
    if dev >= len(every):
        raise ConfigError(f"`data.dev` is {dev}, and {str(folder)!r} holds {len(every)} training images: give fewer.")
    rest, held_out = stratified_split(every.labels, dev, name, "dev")
    splits: dict[Split, ArrayDataset] = {"train": every.select(rest), "dev": every.select(held_out), "test": test}
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
