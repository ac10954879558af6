"""Run by the launcher with FSDP2: the loop on sharded tasks against the loop on whole ones, for the pretext tasks that are named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import dist_info, start_accelerator
from ssl_pipeline.engine.loop import fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.distributed.every_task import OPTIONS, distance
from tests.tasks import Recorder, tiny_config

SAMPLES, SIZE, STEPS = 24, 16, 3
GENTLE = OptimConfig(
    name="sgd", lr=0.05, scaling="none", grad_clip_norm=0.5
)  # Adam would blow up the last bits of tiny gradients
FIXED_TEMPERATURE = {name: options for name, options in OPTIONS.items() if name != "simclr"}


def source() -> ArrayDataset:
    pixels = torch.randint(0, 256, (SAMPLES, 1, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ArrayDataset("random", pixels, torch.arange(SAMPLES) % 3, ("a", "b", "c"))


def task_of(name: str) -> tuple[Task, IndexedLoader]:
    config = tiny_config(name, FIXED_TEMPERATURE.get(name, ()))
    blueprint = EncoderSpec(
        backbone=BackboneConfig(name="timm/test_vit"), neck=NeckConfig(), channels=1, size=SIZE, mean=(0.5,), std=(0.2,)
    )
    images = source()
    assert images.pixels is not None
    pixels = images.pixels[:, :, :SIZE, :SIZE].float() / 255
    torch.manual_seed(0)
    task = config.build(blueprint.build()[0], images)
    with torch.no_grad():
        task.prime(lambda forward: forward(pixels))
    policy = ViewsConfig(size=SIZE, num_views=config.views_needed or 2).for_channels(1)[0]
    views = Views(policy, (0.5,), (0.2,), seed=0)
    share = dist_info(start_accelerator())
    return task, IndexedLoader(images, views, 8, 0, share, STEPS, workers=0, with_labels=task.reads_labels)


def trained(
    name: str, accelerator: Accelerator, optim: OptimConfig, checkpoints: Checkpoints | None, resume: Any = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Every step's loss, and what the caller's task holds in the end."""
    task, batches = task_of(name)

    def evaluate(clock: TrainProgress) -> dict[str, float]:
        return {"sum": float(sum(value.double().sum() for value in task.state_dict().values()))}

    optimizer = build_optimizer(optim, task, 8)
    recorder = Recorder(evaluate, 2)
    fit(TrainState(task, optimizer, optim, accelerator, checkpoints, resume), batches, [recorder])
    losses = [torch.tensor(metrics["train/loss"]) for metrics in recorder.metrics.values()]
    assert not any(isinstance(parameter, DTensor) for parameter in task.parameters())
    assert any(isinstance(p, DTensor) for m in accelerator._models for p in m.parameters()) is accelerator.is_fsdp2
    accelerator.free_memory()
    return losses, {key: value.clone() for key, value in task.state_dict().items()}


def shard(accelerator: Accelerator, wanted: bool) -> None:
    kind = DistributedType.FSDP if wanted else DistributedType.MULTI_CPU
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = kind
    assert accelerator.is_fsdp2 is wanted


def continued(accelerator: Accelerator, folder: Path) -> dict[str, float]:
    """AdamW: begun on shares and continued whole, and the reverse, against a run that stays whole."""
    optim = OptimConfig(name="adamw", lr=1e-3, scaling="none")
    found = {}
    shard(accelerator, False)
    _, wanted = trained("byol", accelerator, optim, None)
    for first in (True, False):
        checkpoints = Checkpoints(folder / str(first), every=1, keep=9, main=accelerator.is_main_process)
        shard(accelerator, first)
        trained("byol", accelerator, optim, checkpoints)
        dist.barrier()
        last = sorted(checkpoints.folder.glob("*.pt"))[-2]
        state = torch.load(last, weights_only=True)
        shard(accelerator, not first)
        _, state_after = trained("byol", accelerator, optim, None, resume=state)
        found[f"continued, sharded {'first' if first else 'last'}"] = distance(state_after, wanted)
        dist.barrier()
    return found


def main() -> None:
    accelerator = start_accelerator()
    assert accelerator.is_fsdp2
    found: dict[str, Any] = {}
    for name in sys.argv[2:]:
        shard(accelerator, False)
        before, whole = trained(name, accelerator, GENTLE, None)
        shard(accelerator, True)
        losses, state = trained(name, accelerator, GENTLE, None)
        weights = {key: value for key, value in whole.items() if key.startswith("encoder.")}
        found[name] = {
            "loss": max(
                (float((a - b).abs() / a.abs().clamp_min(1)) for a, b in zip(before, losses, strict=True)), default=0
            ),
            "state": distance(state, whole),
            "moved": distance(
                weights, {key: value for key, value in task_of(name)[0].state_dict().items() if key in weights}
            ),
        }
    found |= continued(accelerator, Path(sys.argv[1]).parent)
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as in every_task.py


if __name__ == "__main__":
    main()
