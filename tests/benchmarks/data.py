"""Photos to views against lightly's data set and transform, and what a start with a million files costs.

Both sides make two finished SimCLR views of 224 px from the same JPEG photos of 4000×3000 pixels, in batches, by as many
worker processes; ours are finished where a run would finish them, on the GPU if there is one. The third side is a later
epoch from the cache of decoded images. They alternate, so that a slow minute of a shared machine hits all.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from lightly.data import LightlyDataset
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch.utils.data import DataLoader

from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.image_index import HEADER, FileTable, ImageIndex, index_folder
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, default_workers
from ssl_pipeline.data.scan import index_images
from ssl_pipeline.data.sources.folder import Config
from ssl_pipeline.engine.distributed import dist_info, start_accelerator
from ssl_pipeline.transforms.config import BlurConfig, CropConfig, JitterConfig, ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.benchmarks.clock import now
from tests.benchmarks.command import run

_PHOTOS, _DISTINCT, _WIDTH, _HEIGHT, _SIZE, _BATCH = 32, 8, 4000, 3000, 224, 8
# About equally long each: to start and end two workers takes 0.1 s, which is 7 % of a side of 1.6 s and 2 % of one of 6 s.
_EPOCHS_OF_LIGHTLY, _EPOCHS, _EPOCHS_FROM_CACHE = 3, 12, 72
_CLASSES, _FILES, _START_BATCH = 1000, 1_000_000, 64
_MIB, _GIB = 2**20, 2**30
_LONG_AGO = 10**18  # ns


def measure(rounds: int) -> dict[str, float]:
    """Images a second from files, from the cache and by lightly; seconds and memory of a start with a million files."""
    share = dist_info(start_accelerator())
    with tempfile.TemporaryDirectory() as folder:
        return _throughput(Path(folder), share, rounds) | _start(Path(folder))


def _throughput(folder: Path, share: DistInfo, rounds: int) -> dict[str, float]:
    photos, prepared = folder / "photos", folder / "prepared"
    _make_photos(photos)
    index_images(photos.resolve(), index_folder(photos.resolve(), prepared), cache_side=256)
    sides: dict[str, tuple[Callable[[], None], int]] = {
        "lightly": (_lightly(photos, default_workers(share)), _PHOTOS * _EPOCHS_OF_LIGHTLY),
        "files": (_ours(photos, prepared, share, False, _EPOCHS), _PHOTOS * _EPOCHS),
        "cache": (_ours(photos, prepared, share, True, _EPOCHS_FROM_CACHE), _PHOTOS * _EPOCHS_FROM_CACHE),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    # The workers have the cores: a second thread that finishes views, and waits for its turn in a loop, takes theirs.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for side, _ in sides.values():  # warms the page cache and the device up
        side()
    for _ in range(rounds):
        for name, (side, images) in sides.items():
            began = now(share.device)
            side()
            rates[name].append(images / (now(share.device) - began))
    torch.set_num_threads(threads)
    figures = {f"data.{name}_images_per_s": statistics.median(found) for name, found in rates.items()}
    for name, side_name in (("photos", "files"), ("cache", "cache")):
        ratios = [one / other for one, other in zip(rates[side_name], rates["lightly"], strict=True)]
        figures[f"data.speedup_vs_lightly_{name}"] = statistics.median(ratios)
    return figures


def _make_photos(folder: Path) -> None:
    """Smooth colors, finer structure and a sensor's noise, as JPEG of quality 90: about 3 MB each."""
    folder.mkdir()
    for number in range(_PHOTOS):
        path = folder / f"{number:02}.jpg"
        if number >= _DISTINCT:
            path.hardlink_to(folder / f"{number % _DISTINCT:02}.jpg")
            continue
        generator = np.random.default_rng(number)
        layers = [
            np.asarray(
                Image.fromarray(generator.integers(0, 256, (*rough, 3), dtype=np.uint8)).resize(
                    (_WIDTH, _HEIGHT), Image.Resampling.BICUBIC
                ),
                dtype=np.int16,
            )
            for rough in ((12, 16), (150, 200))
        ]
        noise = generator.integers(-6, 7, (_HEIGHT, _WIDTH, 1), dtype=np.int16)
        pixels = layers[0] * 3 // 4 + layers[1] // 4 + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    _age(folder, [*(path.name for path in folder.iterdir()), "."])


def _views(size: int) -> Views:
    config = ViewsConfig(
        size=size,
        crop=CropConfig(scale=(0.08, 1.0)),
        color_jitter=JitterConfig(probability=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        grayscale=0.2,
        gaussian_blur=BlurConfig(probability=0.5, sigma=(0.1, 2.0)),
    )
    return Views(config, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), seed=0)


def _ours(photos: Path, prepared: Path, share: DistInfo, cache: bool, epochs: int) -> Callable[[], None]:
    source = Config(name="folder", path=str(photos), prepared=str(prepared), cache=cache).open("train")
    assert source is not None
    steps = _PHOTOS // _BATCH * epochs
    batches = IndexedLoader(source, _views(_SIZE), _BATCH, 0, share, steps)

    def side() -> None:
        for batch in batches.from_step(0):
            assert batch.views[1].shape == (_BATCH, 3, _SIZE, _SIZE)

    return side


def _lightly(photos: Path, workers: int) -> Callable[[], None]:
    dataset = LightlyDataset(str(photos), transform=SimCLRTransform(input_size=_SIZE))

    def side() -> None:
        # Its workers live through the epochs, as ours do.
        loader = DataLoader(dataset, _BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
        for _ in range(_EPOCHS_OF_LIGHTLY):
            for views, _, _ in loader:
                assert views[1].shape == (_BATCH, 3, _SIZE, _SIZE)

    return side


def _start(folder: Path) -> dict[str, float]:
    """Two processes that start on one index, one after the other; the first stays."""
    root, prepared = (folder / "million").resolve(), folder / "prepared"
    _make_million(root, prepared)
    began = time.perf_counter()
    first = _process(root, prepared)
    assert first.stdout is not None
    told = json.loads(first.stdout.readline())
    seconds = time.perf_counter() - began
    second = _process(root, prepared)
    assert second.stdout is not None
    added = json.loads(second.stdout.readline())["private_bytes"]
    for process in (first, second):
        process.communicate("\n")
    return {
        "data.first_batch_s_1m": seconds,
        "data.first_batch_gib_1m": told["bytes"] / _GIB,
        "data.second_process_mib_1m": added / _MIB,
    }


def _make_million(root: Path, prepared: Path) -> None:
    """An index of a million files in a thousand class folders, of which those of the first batch are there."""
    folders = [".", *(f"class{number:04}" for number in range(_CLASSES))]
    per_class = _FILES // _CLASSES
    names = [f"{folder}/{number:06}.jpg" for folder in folders[1:] for number in range(per_class)]
    columns = FileTable.of(names).columns
    columns["folder"][:] = np.arange(_FILES) // per_class + 1
    for name, value in {
        "bytes": 1000,
        "mtime": _LONG_AGO,
        "width": 64,
        "height": 48,
        "mode": 1,
        "checked": HEADER,
    }.items():
        columns[name][:] = value
    index = ImageIndex(
        root, columns, folders, [_LONG_AGO] * len(folders), [], time.time_ns(), {"": 0}, {"": 0, "RGB": 1}
    )
    index.save(index_folder(root, prepared))
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    _age(root, folders)
    source, batches = _open_million(root, prepared)
    first = [source.describe(int(i)) for i in batches.samples(0)]
    for path in first:
        Image.new("RGB", (64, 48), "green").save(path)
    _age(root, folders)


def _age(root: Path, names: list[str]) -> None:
    """As if they had been written long ago: what has changed just now is looked at again at the next start."""
    for name in names:
        os.utime(root / name, ns=(_LONG_AGO, _LONG_AGO))


def _open_million(root: Path, prepared: Path) -> tuple[FileDataset, IndexedLoader]:
    source = Config(name="folder", path=str(root), prepared=str(prepared)).open("train")
    assert isinstance(source, FileDataset)
    share = DistInfo(0, 1, torch.device("cpu"))
    return source, IndexedLoader(source, _views(32), _START_BATCH, 0, share, 1, workers=1, with_labels=True)


_CHILD = """
import sys
from pathlib import Path
from tests.benchmarks import data
from tests.benchmarks.command import run
data._report_start(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def _process(root: Path, prepared: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _CHILD, str(root), str(prepared)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _report_start(root: Path, prepared: Path) -> None:
    """What :func:`_process` runs: the first batch, then its own figures; ends when it is told to."""
    process = psutil.Process()
    before = _private(process)
    _, batches = _open_million(root, prepared)
    batches.samples(0)
    private = _private(process) - before  # before a worker is forked, which shares all of it
    iterator = batches.from_step(0)
    next(iterator)
    family = [process, *process.children(recursive=True)]
    figures = {"bytes": sum(member.memory_full_info().pss for member in family), "private_bytes": private}
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


def _private(process: psutil.Process) -> int:
    """Bytes that a process holds alone; what it has freed and the C library keeps for it does not count."""
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(process.memory_full_info().uss)


if __name__ == "__main__":
    run(measure, __doc__)
