"""Makes the embedded subset: ``python -m ssl_pipeline.data.embedded.make FOLDER_OF_IDX_FILES [OUT]``."""

from __future__ import annotations

import sys
from pathlib import Path

from ssl_pipeline.data.idx import find_idx, read_idx, write_idx
from ssl_pipeline.data.splits import hold_out

COUNTS = {"train": 8000, "t10k": 2000}


def make(folder: Path, out: Path) -> None:
    """Draws 800 (training) and 200 (test) images of each class, by name, and keeps their order."""
    for part, count in COUNTS.items():
        images = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"))
        labels = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte"))
        _, chosen = hold_out(labels.long(), count, "embedded", part)
        write_idx(out / f"{part}-images-idx3-ubyte.gz", images[chosen])
        write_idx(out / f"{part}-labels-idx1-ubyte.gz", labels[chosen])


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
