"""Run on several processes: each pretext task on this group of processes against one process with the whole batch; mutants, too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_pipeline.config.schema import names
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import two_pass
from ssl_pipeline.losses import gather, info_nce
from ssl_pipeline.pretext.moco_v2 import MoCoV2
from tests.tasks import tiny_batch, tiny_task

SAMPLES, STEPS, RATE = 8, 2, 0.05
OPTIONS = {
    "simclr": ["pretext.temperature.learned.min=0.05"],
    "moco_v2": ["pretext.symmetric=true", "pretext.queue=20"],
    "swav": ["pretext.queue=16", "pretext.queue_start=1 steps", "pretext.freeze_prototypes=0 steps"],
    "dino": ["pretext.freeze_prototypes=1 steps"],
}


def frozen(name: str, dtype: torch.dtype) -> tuple[Task, list[Batch]]:
    """A task whose norms treat samples apart (frozen statistics), and its batches."""
    task, batch = tiny_task(name, OPTIONS.get(name, ()), SAMPLES)
    task = task.to(dtype).eval()
    batches = [tiny_batch(task, len(batch.views), SAMPLES, step) for step in range(STEPS)]
    for one in batches:
        one.views = [view.to(dtype) for view in one.views]
        if name == "supcon":
            one.label = torch.tensor([0, 1, 0, 1, 0, -1, 0, 3])  # some without a partner or a label
    return task, batches


def share(batch: Batch, rank: int, world: int) -> Batch:
    return batch.split(SAMPLES // world)[rank]


class Bare:
    """What the two-pass form asks of an accelerator, for a model that is wrapped already."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def no_sync(self, model: nn.parallel.DistributedDataParallel) -> AbstractContextManager[None]:
        return model.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def run(
    task: Task, model: nn.Module, batches: list[Batch], micro: int | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Plain gradient steps: the losses, and all that is known at the end."""
    losses = []
    for batch in batches:
        task.zero_grad()
        if micro is None:
            output = model(batch)
            output.loss.backward()
        else:
            output = two_pass(task, model, batch, micro, Bare(), lambda _: None)
        losses.append(output.loss.detach())
        for parameter in task.frozen(batch.clock):
            parameter.grad = None
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
        task.after_step(batch)
    gradients = {f"gradient of {n}": p.grad for n, p in task.named_parameters() if p.grad is not None}
    return losses, gradients | dict(task.state_dict())


def alone(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One process with the whole batch: what all others have to equal."""
    task, batches = frozen(name, dtype)
    return run(task, task, batches)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    worst = 0.0
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        worst = (
            max(worst, float((found[key].double() - value.double()).abs().max()) / scale) if value.numel() else worst
        )
    return worst


def compare(
    name: str, dtype: torch.dtype, reference: tuple[list[Tensor], dict[str, Tensor]], micro: int | None = None
) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    task, batches = frozen(name, dtype)
    model = nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
    losses, state = run(task, model, [share(batch, rank, world) for batch in batches], micro)
    means, wanted = torch.stack(losses), torch.stack(reference[0])
    dist.all_reduce(means)
    return {
        "loss": float(((means / world - wanted) / wanted.abs().clamp_min(1)).abs().max()),
        "state": distance(state, reference[1]),
    }


def shuffled() -> tuple[Task, list[Batch]]:
    """MoCo v2 whose BatchNorms go by groups of two images."""
    task, batches = frozen("moco_v2", torch.float64)
    assert isinstance(task, MoCoV2)
    task.group = 2
    return task.train(), batches


def without_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running statistics are of each process's own groups."""
    return {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key}


def compare_shuffled(wanted: tuple[list[Tensor], dict[str, Tensor]]) -> dict[str, float]:
    """The keys' groups are drawn from the batch of all processes."""
    (task, batches), rank, world = shuffled(), dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
    losses, state = run(task, model, [share(batch, rank, world) for batch in batches])
    means = torch.stack(losses)
    dist.all_reduce(means)
    found, expected = without_statistics(state), without_statistics(wanted[1])
    return {
        "loss": float((means / world - torch.stack(wanted[0])).abs().max()), "state": distance(found, expected),
    }  # fmt: skip


def own_slice(ctx: Any, *gradients: Tensor) -> Tensor:
    return gradients[0].chunk(dist.get_world_size())[dist.get_rank()]


def divided(ctx: Any, *gradients: Tensor) -> Tensor:
    gradient = gradients[0].contiguous().clone()
    dist.all_reduce(gradient)
    return gradient.chunk(dist.get_world_size())[dist.get_rank()] / dist.get_world_size()


def without(argument: str) -> Callable[..., Tensor]:
    """InfoNCE that forgets one of its matches."""
    real = info_nce.info_nce

    def mutant(*values: Any, **named: Any) -> Tensor:
        values = tuple(None if place == 4 and argument == "own" else value for place, value in enumerate(values))
        return real(*values, **named)

    return mutant


def main() -> None:
    reference = {
        (name, dtype): alone(name, dtype) for name in names("pretext") for dtype in (torch.float64, torch.float32)
    }
    in_one, batches = shuffled()
    wanted_shuffled = run(in_one, in_one, batches)
    dist.init_process_group("gloo")
    found: dict[str, dict[str, float]] = {"shuffled moco_v2": compare_shuffled(wanted_shuffled)}
    for (name, dtype), expected in reference.items():
        found[f"{name} {str(dtype).removeprefix('torch.')}"] = compare(name, dtype, expected)
    for name in ("simclr", "moco_v2", "swav", "barlow_twins"):
        found[f"two-pass {name}"] = compare(name, torch.float64, reference[name, torch.float64], micro=2)
    wanted = reference["simclr", torch.float64]
    mutations: dict[str, tuple[Any, str, Any]] = {
        "own-slice gradient": (gather._Gather, "backward", staticmethod(own_slice)),
        "divided by world": (gather._Gather, "backward", staticmethod(divided)),
        "labels not shifted": (info_nce, "rank_and_world_size", lambda: (0, dist.get_world_size())),
        "self not masked": (info_nce, "info_nce", without("own")),
    }
    for title, (place, attribute, mutant) in mutations.items():
        real = place.__dict__[attribute]
        setattr(place, attribute, mutant)
        found[f"mutant: {title}"] = compare("simclr", torch.float64, wanted)
        setattr(place, attribute, real)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads and the interpreter's end race now and then, after all that is tested here is done


if __name__ == "__main__":
    main()
