"""A cost model of large runs: ImageNet on 8 GPUs, LAION-size data on 256. Arithmetic alone: nothing is run or measured.

Its inputs are assumptions, stated in docs/scale.md with where they are from. What can't be worked out from them (stragglers, a file
system's tail, congestion) is not in it: read its times as lower bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_FORWARD_AND_BACKWARD = 3  # a backward is two forwards' work
_GRADIENT_BYTES, _ROW_BYTES = 4, 4


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Attributes:
        gpus: of all nodes together.
        per_node: of a node.
        flops: that a GPU reaches in training, per second: its peak times the share that the network gets out of it.
        gpu_bytes: memory of a GPU.
        bus: bytes a second that a GPU sends in a collective, the slowest link's.
        overlap: the share of the gradient's exchange that hides behind the backward.
        cores: of a node.
        storage: bytes a second that all nodes together can read.
        write: bytes a second at which a checkpoint is written.
        gpu_mtbf: hours of one GPU between two failures that stop a run.
        restart: seconds from a failure to the first new step.
    """

    gpus: int
    per_node: int
    flops: float
    gpu_bytes: float
    bus: float
    overlap: float
    cores: int
    storage: float
    write: float
    gpu_mtbf: float
    restart: float


@dataclass(frozen=True)
class Job:
    """The run.

    Attributes:
        images: of the data.
        image_bytes: of a stored one, on average.
        epochs: how often each is seen.
        batch: images of a step.
        views: of an image through the student.
        teacher: whether a momentum teacher sees the same views.
        forward_flops: of the network for a view (two a multiplication and addition).
        parameters: of the student.
        optimizer_bytes: of state for a parameter.
        saved_bytes: kept of a view between forward and backward.
        width: of the rows that the loss compares over all processes.
        decode_seconds: of a core for an image: decoding, and one crop a view.
    """

    images: float
    image_bytes: float
    epochs: float
    batch: int
    views: int
    teacher: bool
    forward_flops: float
    parameters: float
    optimizer_bytes: int
    saved_bytes: float
    width: int
    decode_seconds: float


_A100: dict[str, Any] = {
    "per_node": 8, "gpu_bytes": 80e9, "overlap": 0.8, "cores": 96, "gpu_mtbf": 50_000, "restart": 300,
}  # fmt: skip
_PEAK = 312e12
IMAGENET = (
    Job(
        images=1.281e6, image_bytes=110e3, epochs=100, batch=4096, views=2, teacher=False, forward_flops=8.2e9,
        parameters=28e6, optimizer_bytes=4, saved_bytes=90e6, width=128, decode_seconds=4e-3,
    ),
    Cluster(gpus=8, flops=0.2 * _PEAK, bus=200e9, storage=2e9, write=1e9, **_A100),
)  # fmt: skip
LAION = (
    Job(
        images=2e9, image_bytes=41e3, epochs=1, batch=16_384, views=2, teacher=True, forward_flops=123e9,
        parameters=330e6, optimizer_bytes=8, saved_bytes=165e6, width=256, decode_seconds=4e-3,
    ),
    Cluster(gpus=256, flops=0.4 * _PEAK, bus=20e9, storage=20e9, write=1e9, **_A100),
)  # fmt: skip


def measure(rounds: int) -> dict[str, float]:
    """The two plans; ``load`` is how much of each resource a run that no other one holds up needs (above 1 it does not fit)."""
    del rounds  # nothing is repeated
    figures: dict[str, float] = {}
    for name, (job, cluster) in {"imagenet": IMAGENET, "laion": LAION}.items():
        figures |= {f"plan.{name}.{key}": value for key, value in plan(job, cluster).items()}
    return figures


def plan(job: Job, cluster: Cluster) -> dict[str, float]:
    """Times, sizes and loads of a run."""
    compute = job.batch * image_flops(job) / cluster.gpus / cluster.flops
    gradient = all_reduce_bytes(job.parameters * _GRADIENT_BYTES, cluster.gpus) / cluster.bus
    loss = loss_bytes(job, cluster.gpus) / cluster.bus
    gpu_step = compute + gradient * (1 - cluster.overlap) + loss
    read, decode = (
        job.batch * job.image_bytes / cluster.storage,
        job.batch * job.decode_seconds / (cluster.cores * cluster.gpus / cluster.per_node),
    )
    step = max(gpu_step, read, decode)
    steps = math.floor(job.images / job.batch) * job.epochs
    mtbf = cluster.gpu_mtbf * 3600 / cluster.gpus
    saving = checkpoint_bytes(job) / cluster.write
    cadence = daly(saving, mtbf)
    lost = saving / cadence + cadence / 2 / mtbf + cluster.restart / mtbf
    return {
        "step_s": step,
        "compute_s": compute,
        "gradient_exchange_s": gradient,
        "loss_exchange_s": loss,
        "images_per_s": job.batch / step,
        "steps": steps,
        "hours": steps * step * (1 + lost) / 3600,
        "gpu_hours": steps * step * (1 + lost) / 3600 * cluster.gpus,
        "data_tb": job.images * job.image_bytes / 1e12,
        "shards_of_1_gb": shards(job, cluster),
        "storage_gb_per_s": job.batch / step * job.image_bytes / 1e9,
        "cores_decoding": job.batch / step * job.decode_seconds,
        "checkpoint_gb": checkpoint_bytes(job) / 1e9,
        "mtbf_h": mtbf / 3600,
        "checkpoint_every_min_young": young(saving, mtbf) / 60,
        "checkpoint_every_min_daly": cadence / 60,
        "checkpoint_every_steps": cadence / step,
        "lost_share": lost,
        "load.gpu_memory": gpu_bytes(job, cluster.gpus) / cluster.gpu_bytes,
        "load.network": (gradient + loss) / compute,
        "load.storage": read / gpu_step,
        "load.cores": decode / gpu_step,
    }


def image_flops(job: Job) -> float:
    """Of all views of an image: student forward and backward, teacher forward."""
    passes = _FORWARD_AND_BACKWARD + (1 if job.teacher else 0)
    return job.views * passes * job.forward_flops


def all_reduce_bytes(payload: float, processes: int) -> float:
    """That a process sends in a ring: 2 · (n − 1) ÷ n of the payload."""
    return 2 * (processes - 1) / processes * payload


def all_gather_bytes(own: float, processes: int) -> float:
    """That a process sends in a ring: its own rows pass on, and those of n − 2 others."""
    return (processes - 1) * own


def loss_bytes(job: Job, processes: int) -> float:
    """Of an InfoNCE over all rows: gathered forward, their gradient summed backward."""
    rows = job.views * job.batch * job.width * _ROW_BYTES
    return all_gather_bytes(rows / processes, processes) + all_reduce_bytes(rows, processes)


def gpu_bytes(job: Job, processes: int) -> float:
    """Of a GPU under DistributedDataParallel: weights, gradients, optimizer, teacher, and what the backward needs."""
    fixed = (4 + _GRADIENT_BYTES + job.optimizer_bytes + (4 if job.teacher else 0)) * job.parameters
    return fixed + job.batch / processes * job.views * job.saved_bytes


def checkpoint_bytes(job: Job) -> float:
    """Weights, optimizer and teacher in fp32."""
    return (4 + job.optimizer_bytes + (4 if job.teacher else 0)) * job.parameters


def shards(job: Job, cluster: Cluster, size: float = 1e9, workers: int = 4) -> int:
    """Archives of about ``size`` bytes, at least one for each worker of each GPU, a multiple of these, so that none idles."""
    lanes = cluster.gpus * workers
    return lanes * max(1, round(job.images * job.image_bytes / size / lanes))


def young(saving: float, mtbf: float) -> float:
    r"""Seconds between two checkpoints, :math:`\sqrt{2 \delta M}` (Young 1974)."""
    return math.sqrt(2 * saving * mtbf)


def daly(saving: float, mtbf: float) -> float:
    r"""Likewise with the terms of higher order (Daly 2006, equation 37); the mean time between failures where saving takes twice that."""
    if saving >= 2 * mtbf:
        return mtbf
    ratio = saving / 2 / mtbf
    return young(saving, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - saving
