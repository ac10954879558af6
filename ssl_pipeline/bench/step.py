"""Pretraining's throughput against the model alone: what data, views, logging and checkpoints cost.

Both sides train the same SimCLR task on the same images with the same optimizer. The model-only side repeats forward,
backward and step on two views that are there already; the other side is the loop that ``pretrain`` runs. They alternate
within one process, so that a slow minute of a shared machine hits both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ssl_pipeline.data.loader import StepBatches
from ssl_pipeline.data.source import ArraySource
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import share_of, start_accelerator
from ssl_pipeline.engine.fit import fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.model.artifact import Blueprint
from ssl_pipeline.model.backbone import BackboneConfig
from ssl_pipeline.model.neck import NeckConfig
from ssl_pipeline.pretext import simclr
from ssl_pipeline.track.jsonl import FILE_NAME, JsonlLog
from ssl_pipeline.views.policy import Views, ViewsConfig

_BATCH, _STEPS, _SIZE = 128, 6, 32
_OPTIM = OptimConfig(name="sgd")


def measure(rounds: int) -> dict[str, float]:
    """ResNet-18 at 32 px in colour, two views, fp32: images a second on both sides, and their ratio."""
    accelerator = start_accelerator()
    share = share_of(accelerator)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_BATCH * _STEPS, 3, _SIZE, _SIZE), generator=generator, dtype=torch.uint8)
    source = ArraySource("random images", pixels)
    neutral = (0.5,) * 3, (0.25,) * 3
    views = Views(ViewsConfig(size=_SIZE).for_channels(3)[0], *neutral, seed=0)
    batches = StepBatches(source, views, _BATCH, 0, share, _STEPS)
    mean, std = neutral
    blueprint = Blueprint(
        backbone=BackboneConfig(name="resnet18"), neck=NeckConfig(), channels=3, size=_SIZE, mean=mean, std=std
    )
    task = simclr.Config(name="simclr").build(blueprint.build()[0], source)
    task = task.to(share.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    alone, whole = [], []
    _model_only(task, batches, accelerator)  # warms allocators and kernels up
    for _ in range(rounds):
        alone.append(_model_only(task, batches, accelerator))
        whole.append(_pretraining(task, batches, accelerator))
    ratios = [one / other for one, other in zip(whole, alone, strict=True)]
    return {
        "step.model_only_images_per_s": statistics.median(alone),
        "step.pretraining_images_per_s": statistics.median(whole),
        "step.efficiency": statistics.median(ratios),
    }


def _wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _model_only(task: simclr.SimCLR, batches: StepBatches, accelerator: Accelerator) -> float:
    batch = next(batches.from_step(0))
    optimizer = build_optimizer(_OPTIM, task, _BATCH)
    task.train()
    _wait(accelerator)
    began = time.perf_counter()
    for _ in range(_STEPS):
        with accelerator.autocast():
            output = task(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(accelerator)
    return _STEPS * _BATCH / (time.perf_counter() - began)


def _pretraining(task: simclr.SimCLR, batches: StepBatches, accelerator: Accelerator) -> float:
    optimizer = build_optimizer(_OPTIM, task, _BATCH)
    with tempfile.TemporaryDirectory() as folder:
        log = JsonlLog(Path(folder) / FILE_NAME)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", "bench")
        _wait(accelerator)
        began = time.perf_counter()
        fit(task, batches, _OPTIM, optimizer, accelerator, checkpoints, listeners=(log.log,), log_every=2)
        _wait(accelerator)
        seconds = time.perf_counter() - began
        log.finish()
    accelerator.free_memory()
    return _STEPS * _BATCH / seconds
