"""Run by `accelerate launch`: stage one, whose looks at the trained backbone last for minutes; process 1 is told to stop in one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.evaluation import features
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import main
from ssl_pipeline.transforms.preprocessing import Preprocessing

FOLDER = next(Path(word.removeprefix("output=")) for word in sys.argv if word.startswith("output="))
trained = False


def after_step(self: SimCLR, batch: object) -> None:
    global trained
    trained = True


def slowly(
    source: IndexedDataset, preprocessing: Preprocessing, device: torch.device, index: torch.Tensor
) -> Iterator[torch.Tensor]:
    """A hundred parts of a second each in process 1, where a signal comes with the first."""
    if not trained or os.environ["RANK"] == "0":
        yield from read_in_order(source, preprocessing, device, index)
        return
    (FOLDER / "signaled").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):
        time.sleep(1)
        yield from read_in_order(source, preprocessing, device, index[:1])


SimCLR.after_step = after_step  # type: ignore[method-assign]
features.read_in_order = slowly  # type: ignore[assignment,attr-defined]

if __name__ == "__main__":
    main()
