"""Run on several processes: trains on this group of processes, keeping every step, and continues what others have saved."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ssl_pipeline.config.command import load
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import dist_info, start_accelerator
from ssl_pipeline.engine.failures import command_process
from ssl_pipeline.engine.loop import fit
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.engine.task import PretextConfig, Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.runs import TINY, small_pretext
from tests.tasks import Recorder, as_group_norm

SAMPLES, BATCH, STOP, STEPS = 48, 16, 3, 8
DTYPES = {"double": torch.float64, "single": torch.float32}
WORDS = [
    *TINY,
    *small_pretext("moco_v2"),
    "pretext.temperature.learned.min=0.05",
    "optim=sgd",
    "optim.warmup=0 steps",
]


class Watched(IndexedLoader):
    """Batches of a dtype, whose samples are noted."""

    dtype = torch.float32
    seen: dict[int, list[int]]

    def from_step(self, start: int) -> Iterator[Batch]:
        self.seen = {}
        for batch in super().from_step(start):
            batch.views = [view.to(self.dtype) for view in batch.views]
            self.seen[batch.clock.step] = batch.index.tolist()
            yield batch


def build(config: PretrainConfig, source: ArrayDataset) -> Task:
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=1, size=12, mean=(0.0,), std=(1.0,)
    )
    torch.manual_seed(0)
    assert isinstance(config.pretext, PretextConfig)
    task = config.pretext.build(blueprint.build()[0], source)
    as_group_norm(task)
    return task


def train(folder: Path, dtype: torch.dtype) -> None:
    """From the folder's last checkpoint, or the start, to the end; a checkpoint and the samples of every step are left."""
    accelerator = start_accelerator()
    share = dist_info(accelerator)
    config = load("pretrain", PretrainConfig, WORDS)
    pixels = torch.randint(0, 256, (SAMPLES, 1, 14, 14), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    source = ArrayDataset("random", pixels, torch.arange(SAMPLES) % 2, ("a", "b"))
    views, _ = config.transform.for_channels(1)
    batches = Watched(source, Views(views, (0.0,), (1.0,), 0), BATCH, 0, share, STEPS)
    batches.dtype = dtype
    task = build(config, source).to(dtype)
    optimizer = build_optimizer(config.optim, task, BATCH)
    checkpoints = Checkpoints(folder, 1, keep=99, main=share.rank == 0)
    recorder = Recorder()
    fit(TrainState(task, optimizer, config.optim, accelerator, checkpoints, checkpoints.load()), batches, [recorder])
    rates = {done: metrics["train/lr"] for done, metrics in recorder.metrics.items()}
    (folder / f"seen-{share.rank}.json").write_text(json.dumps({"samples": batches.seen, "rates": rates}))
    accelerator.wait_for_everyone()


def take_on(before: Path, after: Path) -> None:
    """Gives a run the state in which another one stopped."""
    after.mkdir(parents=True)
    shutil.copy(before / f"step-{STOP:09d}.pt", after)


def main() -> None:
    root, accelerator = Path(sys.argv[1]), start_accelerator()
    for name, dtype in DTYPES.items():
        train(root / name / "two", dtype)
        if accelerator.is_main_process:
            take_on(root / name / "two", root / name / "two_then_two")
        accelerator.wait_for_everyone()
        train(root / name / "two_then_two", dtype)
        train(root / name / "one_then_two", dtype)


if __name__ == "__main__":
    with command_process():
        main()
