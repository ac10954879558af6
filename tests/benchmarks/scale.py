"""Several processes on this machine: time, bytes on the wire against the ring's formulas, and memory against what is kept of an image.

Each process embeds the same number of images, so that a perfect machine would take the same time for a step with any number of
them. Here they share its cores: with more processes than cores the time says nothing about a cluster; the bytes do. What the loss
and DistributedDataParallel hand to the collectives is counted there; what crosses the wire is the kernel's count of the loopback
interface, the least of the rounds, as other programs use it too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ssl_pipeline.config.base import UserError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretext import simclr
from ssl_pipeline.schedules import TrainProgress
from tests.benchmarks.command import run
from tests.benchmarks.loss import resident_kib

_OWN, _SIZE, _WIDTH, _STEPS = 32, 32, 128, 8
_MEMORY = ((64, 16), (256, 16), (64, 64), (256, 64))  # images of a step, channels of the first stage
_PROBE = 8  # images from which what is kept of one is counted


def measure(rounds: int) -> dict[str, float]:
    """SimCLR on a small ResNet at 32 px, fp32, one thread a process, gloo."""
    found = {processes: _group(processes, rounds) for processes in (1, 2, 4)}
    figures = {"scale.cores": float(len(os.sched_getaffinity(0)))}
    for processes, one in found.items():
        figures[f"scale.step_ms_{processes}"] = one["seconds"] * 1000
    for processes in (2, 4):
        one = found[processes]
        rows = 2 * _OWN * processes * _WIDTH * 4
        gathered = all_gather_bytes(rows / processes, processes)
        formulas = {
            "ddp": (all_reduce_bytes(one["parameters"] * 4, processes), all_reduce_bytes(one["ddp"], processes)),
            "loss": (
                gathered + all_reduce_bytes(rows, processes),
                all_gather_bytes(one["gathered"], processes) + all_reduce_bytes(one["reduced"], processes),
            ),
        }
        figures[f"scale.step_vs_one_{processes}"] = one["seconds"] / found[1]["seconds"]
        for name, (formula, counted) in formulas.items():
            figures[f"scale.{name}_kib_by_formula_{processes}"] = formula / 1024
            figures[f"scale.{name}_counted_vs_formula_{processes}"] = counted / formula
        total = sum(counted for _, counted in formulas.values())
        figures[f"scale.wire_kib_{processes}"] = one["wire"] / 1024
        figures[f"scale.wire_vs_counted_{processes}"] = one["wire"] / total
    for batch, width in _MEMORY:
        formula, measured = _child(f"print_memory({batch}, {width})")
        figures[f"scale.memory_mib_batch{batch}_width{width}"] = measured
        figures[f"scale.memory_vs_formula_batch{batch}_width{width}"] = measured / formula
    return figures


def all_reduce_bytes(payload: float, processes: int) -> float:
    """Bytes a process sends in a ring: 2 · (n - 1) ÷ n of the payload."""
    return 2 * (processes - 1) / processes * payload


def all_gather_bytes(own: float, processes: int) -> float:
    """Bytes a process sends in a ring: its own rows, and those of n - 2 others that it passes on."""
    return (processes - 1) * own


def _group(processes: int, rounds: int) -> dict[str, float]:
    """One group's figures, by its first process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launcher = [
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
        ]
        words = [sys.executable, "-m", *launcher, "-m", "tests.benchmarks.scale", str(out), str(rounds)]
        done = subprocess.run(
            words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"{processes} processes can't be measured here: {done.stderr.strip().splitlines()[-1]}")
        found: dict[str, float] = json.loads(out.read_text())
        return found


def _work(out: Path, rounds: int) -> None:
    """What each process of a group does."""
    torch.set_num_threads(1)
    accelerator = start_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    task, batch = _task(_OWN, 16)
    batch.index += rank * _OWN
    model, optimizer = accelerator.prepare(task, build_optimizer(OptimConfig(), task, _OWN * world))
    counts: Counter[str] = Counter()
    if world > 1:
        model.register_comm_hook(None, lambda _, bucket: _counted(bucket, counts))

    def step() -> None:
        accelerator.backward(model(batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # buckets are laid out anew after the first
        step()
    counts.clear()
    with _counting_collectives(counts):
        step()
    counted = {"ddp": counts["ddp"], "gathered": counts["gathered"], "reduced": counts["reduced"] - counts["ddp"]}
    seconds, wire = [], []
    for _ in range(rounds):
        accelerator.wait_for_everyone()
        before, began = _loopback_bytes(), time.perf_counter()
        for _ in range(_STEPS):
            step()
        accelerator.wait_for_everyone()
        seconds.append((time.perf_counter() - began) / _STEPS)
        wire.append((_loopback_bytes() - before) / _STEPS / world)
    if accelerator.is_main_process:
        parameters = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
        figures = {"seconds": statistics.median(seconds), "wire": min(wire), "parameters": parameters, **counted}
        out.write_text(json.dumps(figures))
    accelerator.wait_for_everyone()
    os._exit(0)  # as engine.failures.command_process does


def _task(images: int, width: int) -> tuple[Task, Batch]:
    generator = torch.Generator().manual_seed(0)
    blueprint = EncoderSpec(
        backbone=BackboneConfig(name="small_resnet", width=width), neck=NeckConfig(), channels=3, size=_SIZE,
        mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    source = ArrayDataset("none", torch.zeros(2, 3, _SIZE, _SIZE, dtype=torch.uint8))
    torch.manual_seed(0)
    task = simclr.Config(name="simclr", hidden_width=512, projection_width=_WIDTH).build(blueprint.build()[0], source)
    views = [torch.randn(images, 3, _SIZE, _SIZE, generator=generator) for _ in range(2)]
    return task, Batch(TrainProgress(0, 10, 10), torch.arange(images), views)


def _counted(bucket: Any, counts: Counter[str]) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's own exchange of a bucket, counted."""
    counts["ddp"] += bucket.buffer().nbytes
    return allreduce_hook(dist.distributed_c10d._get_default_group(), bucket)


@contextmanager
def _counting_collectives(counts: Counter[str]) -> Iterator[None]:
    """Counts the bytes that are given to collectives from Python: the loss's, and those of :func:`_counted` once more."""
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(parts: list[Tensor], rows: Tensor, *rest: Any, **named: Any) -> Any:
        counts["gathered"] += rows.nbytes
        return gather(parts, rows, *rest, **named)

    def counting_reduce(rows: Tensor, *rest: Any, **named: Any) -> Any:
        counts["reduced"] += rows.nbytes
        return reduce(rows, *rest, **named)

    with patch.object(dist, "all_gather", counting_gather), patch.object(dist, "all_reduce", counting_reduce):
        yield


def _loopback_bytes() -> int:
    """That the kernel has sent over the loopback interface since it started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def _child(call: str) -> list[float]:
    """The numbers that a call of this module's prints, in a process of its own."""
    words = [sys.executable, "-c", f"from tests.benchmarks import scale; scale.{call}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # so that what is freed goes back
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return [float(number) for number in done.stdout.split()]


def print_memory(images: int, width: int) -> None:
    """Prints two numbers of MiB: by the formula, and at the greatest moment of a step above what the process held before.

    The formula: gradients and momentum, 8 bytes a parameter, and what autograd keeps of an image times the images.
    """
    torch.set_num_threads(1)
    kept = _kept_bytes(width)
    task, batch = _task(images, width)
    optimizer = build_optimizer(OptimConfig(), task, images)
    formula = 8 * sum(parameter.numel() for parameter in task.parameters()) + kept * images
    before = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    task(batch).loss.backward()
    optimizer.step()
    sys.stdout.write(f"{formula / 2**20} {(resident_kib('VmHWM') - before) / 1024}\n")


def _kept_bytes(width: int) -> float:
    """What autograd keeps of an image (both views) for the backward, each storage once, weights left out."""
    task, batch = _task(_PROBE, width)
    weights = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task(batch).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / _PROBE
    loss.backward()  # makes allocators and kernels warm for what is measured next
    return size


if __name__ == "__main__":
    if "RANK" in os.environ:
        _work(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        run(measure, __doc__)
