"""Fashion-MNIST, whole: 60,000 training and 10,000 test images of clothes, 28×28, grey."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from urllib.error import URLError

from pydantic import Field
from torchvision.datasets import FashionMNIST

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.idx import find_idx, read_idx
from ssl_pipeline.data.source import ArraySource, SourceConfig, Split
from ssl_pipeline.data.splits import hold_out

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Config(SourceConfig):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT licence.

    Attributes:
        path: a folder with the four idx files, gzipped or not; null downloads them by torchvision.
        download_to: where a download is kept.
        dev: training images held out for choices.
    """

    path: str | None = None
    download_to: str = "~/.cache/ssl_pipeline"
    dev: int = Field(5000, ge=1, le=30_000)

    def open(self, split: Split) -> ArraySource:
        """A split; ``dev`` is the same for every seed."""
        if self.path is not None and not Path(self.path).expanduser().is_dir():
            raise ConfigError(f"`data.path`: there is no folder {self.path!r}.")
        folder = (
            Path(self.path).expanduser() if self.path is not None else _download(Path(self.download_to).expanduser())
        )
        return open_idx_folder("fashion_mnist", folder, self.dev, split)


def _download(root: Path) -> Path:
    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError, URLError) as error:
        raise ConfigError(
            f"Fashion-MNIST can't be downloaded ({error}). Copy its four idx files to a folder and give `data.path=FOLDER`, "
            "or use the subset that is here already: `data=embedded`."
        ) from error
    return root


@lru_cache(maxsize=4)
def open_idx_folder(name: str, folder: Path, dev: int, split: Split) -> ArraySource:
    """A split of a folder of idx files; the pixels' statistics are those of all training images without ``dev``."""
    part = "t10k" if split == "test" else "train"
    pixels = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"))[:, None]
    labels = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte")).long()
    source = ArraySource(name, pixels, labels, CLASSES, "MIT")
    if split == "test":
        return source
    train, held_out = hold_out(labels, dev, name, "dev")
    chosen = source.select(train if split == "train" else held_out)
    if split == "train":
        chosen.mean, chosen.std = chosen.statistics()
    return chosen
