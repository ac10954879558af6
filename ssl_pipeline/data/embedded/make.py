"""Makes the embedded subset: ``python -m ssl_pipeline.data.embedded.make FOLDER_OF_IDX_FILES [OUT]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.idx import find_idx, read_idx, write_idx
from ssl_pipeline.data.splits import stratified_split

COUNTS = {"train": 8000, "t10k": 2000}


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
        "out", type=Path, nargs="?", default=Path(__file__).parent, help="by default the package itself"
    )
    given = parser.parse_args()
    try:
        make(given.folder, given.out)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
