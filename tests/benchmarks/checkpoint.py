"""What a checkpoint costs: how long the loop stands still for one, of a small state and of a ResNet-50's, against its steps.

A small state is written before the loop goes on; of a large one the loop waits for the copy, and a thread writes it.
``--rounds`` is the number of checkpoints.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.optim import Optimizer

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretext import simclr
from ssl_pipeline.schedules import TrainProgress
from tests.benchmarks.command import run

_STEPS, _WARM_UP = 3, 1
_BETWEEN = 100  # steps between two checkpoints
_MIB = 2**20
# Backbone, side of the images, and batch on a CPU and on a GPU.
_SIZES = {"small_resnet": (28, 64, 256), "resnet50": (224, 4, 128)}


def measure(rounds: int) -> dict[str, float]:
    """Seconds and share of the run, per backbone."""
    device = start_accelerator().device
    figures: dict[str, float] = {}
    for name, (side, small, large) in _SIZES.items():
        task, batch = _task(name, side, small if device.type == "cpu" else large)
        task = task.to(device)
        batch.index, batch.views = batch.index.to(device), [view.to(device) for view in batch.views]
        optimizer = build_optimizer(OptimConfig(), task, len(batch.index))
        step = statistics.median(_step(task, batch, optimizer) for _ in range(_WARM_UP + _STEPS))
        pauses, writes = [], []
        with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder) / "checkpoints") as checkpoints:
            for number in range(rounds):
                began = time.perf_counter()
                checkpoints.save(
                    number, {"task": task.state_dict(), "optimizer": optimizer.state_dict(), "scaler": None}
                )
                pauses.append(time.perf_counter() - began)
                checkpoints.wait()
                writes.append(time.perf_counter() - began)
            file = next((Path(folder) / "checkpoints").iterdir())
            figures[f"checkpoint.{name}.mib"] = file.stat().st_size / _MIB
        pause, write = statistics.median(pauses), statistics.median(writes)
        figures |= {
            f"checkpoint.{name}.step_s": step,
            f"checkpoint.{name}.until_on_disk_s": write,
            f"checkpoint.{name}.pause_s": pause,
            f"checkpoint.{name}.pause_percent_of_{_BETWEEN}_steps": 100 * pause / (_BETWEEN * step),
        }
    return figures


def _task(backbone: str, side: int, batch: int) -> tuple[Task, Batch]:
    pixels = torch.zeros(batch, 3, 8, 8, dtype=torch.uint8)
    blueprint = EncoderSpec(
        backbone=BackboneConfig(name=backbone), neck=NeckConfig(), channels=3, size=side,
        mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    task = simclr.Config(name="simclr").build(blueprint.build()[0], ArrayDataset("noise", pixels))
    views = [torch.randn(batch, 3, side, side) for _ in range(2)]
    return task, Batch(TrainProgress(0, 10, 1), torch.arange(batch), views, None)


def _step(task: Task, batch: Batch, optimizer: Optimizer) -> float:
    began = time.perf_counter()
    task(batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(measure, __doc__)
