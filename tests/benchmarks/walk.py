"""How many files and functions of ours run in a walk that a reader follows, counted by ``sys.setprofile``.

``python -m tests.benchmarks.walk`` prints them; ``--show NAME`` lists the functions of one walk, to see what could go.
Counted is what runs in any thread of this process. Class and module bodies are no functions, nor are those that dataclasses
make; a lambda or a comprehension is one of the function that it stands in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import CodeType, FrameType

import torch
from PIL import Image

from ssl_pipeline.config.command import load
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.progress import print_table
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.transforms.multi_view import Views

PACKAGE = f"{Path(sys.modules['ssl_pipeline'].__file__ or '').parent}{os.sep}"
_BACKWARD, _STEP = torch.Tensor.backward.__code__, TrainState.step.__code__
_QUIET = ["tracking=off", "tracking.log_images=false", "tracking.progress=quiet", "num_workers=0"]
_TINY = ["backbone.width=4", "data.val=4000"]


class Walk:
    """Collects the code of ours that runs while it is on.

    Attributes:
        functions: file and qualified name of each.
    """

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self._on = False

    @contextmanager
    def counting(self, after: CodeType | None = None, until: CodeType | None = None) -> Iterator[None]:
        """Around what is walked.

        Args:
            after: counts from the first call of this code on, and to its return; None counts from the start.
            until: counts no longer once this code is called.
        """
        self._on = after is None
        first: list[FrameType] = []

        def profile(frame: FrameType, event: str, _: object) -> None:
            code = frame.f_code
            if event == "call":
                if code is after and not first:
                    first.append(frame)
                    self._on = True
                elif code is until:
                    self._on = False
                    sys.setprofile(None)
                if self._on and code.co_filename.startswith(PACKAGE):
                    self._add(code)
            elif event == "return" and first and frame is first[0]:
                self._on = False

        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _add(self, code: CodeType) -> None:
        name = code.co_qualname.partition(".<locals>.<")[0]
        if not name.startswith("<") and code.co_flags & 0x2:  # CO_NEWLOCALS is not set for a module's or a class's body
            self.functions.add((code.co_filename.removeprefix(PACKAGE), name))

    @property
    def files(self) -> list[str]:
        return sorted({file for file, _ in self.functions})


def walks(folder: Path) -> dict[str, Walk]:
    """Each walk's files and functions; runs are made in ``folder``."""
    found = {name: Walk() for name in ("first_backward", "step", "open_folder", "file_to_views", "finetune")}
    config = _pretrain(folder / "counted")
    with found["first_backward"].counting(until=_BACKWARD):
        pretrain(config)
    with found["step"].counting(after=_STEP):
        pretrain(_pretrain(folder / "encoder"))
    words = [*_QUIET, "data.val=4000", "labels.per_class=5", "split=val", f"encoder={folder / 'encoder'}"]
    finetuned = load("finetune", FinetuneConfig, [*words, f"output={folder / 'finetuned'}"])
    with found["finetune"].counting():
        finetune(finetuned)
    _photos(folder / "photos")
    of_files = load("pretrain", PretrainConfig, ["data=folder", f"data.path={folder / 'photos'}"])
    with found["open_folder"].counting():
        source = of_files.data.open("train")
    assert source is not None
    share = DistInfo(0, 1, torch.device("cpu"))
    with found["file_to_views"].counting():
        views = Views(of_files.transform.for_channels(3)[0], (0.5,) * 3, (0.25,) * 3, 0)
        next(iter(IndexedLoader(source, views, 4, 0, share, 1, workers=0).from_step(0)))
    return found


def _pretrain(output: Path) -> PretrainConfig:
    return load("pretrain", PretrainConfig, [*_QUIET, *_TINY, "transform.size=12", "steps=1", f"output={output}"])


def _photos(folder: Path) -> None:
    for number in range(8):
        path = folder / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (20 * number, 90, 60)).save(path)


def measure(show: str | None = None, tell: Callable[[str], object] = sys.stdout.write) -> dict[str, float]:
    """The counts by name; the functions of the walk ``show`` are told, a line each."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        found = walks(Path(folder))
    for file, name in sorted(found[show].functions) if show else []:
        tell(f"{file}: {name}\n")
    counts = {name: {"files": len(walk.files), "functions": len(walk.functions)} for name, walk in found.items()}
    return {f"walk.{name}_{what}": float(number) for name, both in counts.items() for what, number in both.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the counts as one flat object")
    parser.add_argument("--show", help="list the functions of this walk")
    options = parser.parse_args()
    metrics = measure(options.show)
    print_table("walks", ["metric", "value"], [[name, f"{value:.0f}"] for name, value in metrics.items()])
    if options.json is not None:
        options.json.write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
