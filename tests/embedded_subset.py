"""Makes the embedded subset: ``python -m tests.embedded_subset FOLDER_OF_IDX_FILES [OUT]``."""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data import embedded
from ssl_pipeline.data.sources.fashion_mnist import find_idx, read_idx
from ssl_pipeline.data.splits import stratified_split

COUNTS = {"train": 8000, "t10k": 2000}


def write_idx(path: Path, array: Tensor) -> None:
    """Writes uint8 of any shape; gzipped, the same bytes every time, if the name ends in .gz."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    data = header + array.contiguous().numpy().tobytes()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def make(folder: Path, out: Path) -> None:
    """Draws 800 (training) and 200 (test) images of each class, by name, and keeps their order.

    Args:
        folder: the four official idx files.
        out: where the subset's four are written; it is made where it is missing.

    Raises:
        ConfigError: an idx file is missing or damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part, count in COUNTS.items():
        images = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"))
        labels = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte"))
        _, chosen = stratified_split(labels.long(), count, "embedded", part)
        write_idx(out / f"{part}-images-idx3-ubyte.gz", images[chosen])
        write_idx(out / f"{part}-labels-idx1-ubyte.gz", labels[chosen])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Makes the embedded subset of Fashion-MNIST.")
    parser.add_argument("folder", type=Path, help="the four official idx files, gzipped or not")
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path(str(embedded.__file__)).parent, help="by default the package itself"
    )
    given = parser.parse_args()
    try:
        make(given.folder, given.out)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
