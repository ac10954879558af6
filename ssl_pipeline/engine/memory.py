"""How much memory a step will need, estimated before the first one: a process that runs out of it on a CPU is killed.

The estimate, for one process:

- 8 bytes a trained parameter for its gradient and the optimizer's state, 12 with AdamW (weights are there already);
- what autograd keeps between forward and backward, counted by two forwards of few fake tensors, which compute nothing, and taken in
  proportion to the samples that a process embeds at once (``micro_batch_size``, or its share of the batch);
- the views of its whole share, once as they are read and once normalized.

The loss, the backward's working memory and the workers' batches are not in it: small networks took 1.04 to 1.10 times what is kept
(docs/scale.md). So a run that is refused could not have been trained, and one that is let through may still be short of memory.
"""

from __future__ import annotations

import copy
import logging
import os
import resource
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Task
from ssl_pipeline.schedules import TrainProgress

_FEW, _MORE = 4, 8  # samples of the two forwards that are counted: their difference is what grows with the samples
_STATE_BYTES = {"adamw": 12}
_GIB = 2**30
_MOST_BYTES = 20_000  # kept for one value of a view: more than ten times that of any network tried
_SAFE = 0.75  # the share of what is free that a proposed micro-batch may take
_log = logging.getLogger("ssl_pipeline")


class Memory(NamedTuple):
    """Bytes that this machine, or the container or batch job that this process runs in, has at most, and has free."""

    total: float  # swap included
    free: float


def kept_bytes(task: Task, views: Sequence[tuple[int, int, int]], samples: int, whole: bool = True) -> int:
    """Bytes that autograd keeps between forward and backward, without weights; nothing is computed or changed.

    Counted in training mode, with ``views`` of (channels, height, width): ``task.embed``, or, not ``whole``, the encoder alone.
    """
    # Fake tensors take the kernels of their device, where attention keeps less than on the meta device.
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, fakes = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()
    for value in [*task.parameters(), *task.buffers()]:
        fakes[id(value)] = mode.from_tensor(value.detach()).requires_grad_(value.requires_grad)
    weights = {value.untyped_storage()._cdata for value in fakes.values()}
    module = copy.deepcopy(
        task, dict[int, Any](fakes)
    ).train()  # the same modules around fakes: the task stays as it is
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        index = torch.zeros(samples, dtype=torch.int64)
        batch = Batch(TrainProgress(0, 10, 10), index, [torch.zeros(samples, *view) for view in views], index, index)
        if whole:
            module.embed(batch)
        else:
            for view in batch.views:
                module.encoder.features(view)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class StepMemory(NamedTuple):
    """Bytes of a step in one process: whatever the batch is, of an image that is embedded, and of one that is read."""

    fixed: float
    of_image: float
    of_views: float

    def needed(self, images: int, micro: int | None) -> float:
        """Of a share of ``images``, ``micro`` of them embedded at once (None: all)."""
        return self.fixed + self.of_image * (micro or images) + self.of_views * images


def estimate(task: Task, views: Sequence[tuple[int, int, int]], optimizer: str) -> StepMemory | None:
    """The estimate, see the module, for ``views`` of (channels, height, width); None where the network can't run without computing."""
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    for whole in (True, False):
        try:
            few, more = (kept_bytes(task, views, samples, whole) for samples in (_FEW, _MORE))
        except Exception as error:  # some networks read values, and fake tensors have none
            _log.debug("no memory is counted (%s)", error)
            continue
        of_image = (more - few) / (_MORE - _FEW)
        fixed = float(trained * _STATE_BYTES.get(optimizer, 8)) + few - _FEW * of_image
        return StepMemory(fixed, of_image, float(sum(map(prod, views)) * (1 + 4)))
    return None


def check_memory(
    task: Task,
    views: Sequence[tuple[int, int, int]],
    images: int,
    micro: int | None,
    optimizer: str,
    processes: int,
    batch_key: str = "batch_size",
    size_key: str = "transform.size",
    micro_key: str | None = "micro_batch_size",
) -> None:
    """Refuses a step that needs more memory than this machine has, and warns where it is only not free now.

    ``views`` are of (channels, height, width), ``images`` is this process's share of the batch, ``micro`` what it embeds at once
    (None: all), and ``processes`` those on this machine. The message names the keys that set batch, image size and ``micro``; of the
    last None where a whole share is embedded at once in any case.

    Raises:
        ConfigError: with the setting that makes it fit.
    """
    memory = machine_memory()
    weights = sum(parameter.numel() for parameter in task.parameters())
    if processes * (16 * weights + images * sum(map(prod, views)) * _MOST_BYTES) <= memory.free:
        return  # far below what could be short: not worth a forward
    step = estimate(task, views, optimizer)
    needed = 0.0 if step is None else processes * step.needed(images, micro)
    if step is None or needed <= memory.free:
        return
    room = _SAFE * memory.free / processes - step.fixed - step.of_views * images
    parts = range(2, images) if micro_key is not None else ()
    fitting = [part for part in parts if images % part == 0 and part * step.of_image <= room]
    advice = (
        f"embed fewer images at once, which gives the gradient of the same batch: {micro_key}={fitting[-1]}"
        if fitting
        else f"lower `{batch_key}` (it is {images} a process) or `{size_key}`, take a smaller backbone, or use a GPU"
    )
    text = (
        f"a step of {images} images a process, {micro or images} of them embedded at once, needs about {needed / _GIB:.1f} GiB of memory"
        f"{f' in {processes} processes' if processes > 1 else ''}"
    )
    if needed > memory.total:
        raise ConfigError(f"{text}, and this machine has {memory.total / _GIB:.1f} GiB: {advice}.")
    _log.warning("%s, and %.1f GiB are free: if the system ends the run, %s.", text, memory.free / _GIB, advice)


def machine_memory() -> Memory:
    """The memory that this process can have: of the machine with its swap, of its control groups, by its own limit."""
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    found = [Memory(machine.total + swap.total, machine.available + swap.free), *_of_control_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(Memory(limit, limit - psutil.Process().memory_info().vms))
    return Memory(min(one.total for one in found), max(0.0, min(one.free for one in found)))


def _of_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Memory]:
    """Of each control group around this process that has a limit, as containers and batch systems set one."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inside = base / place.lstrip("/")
        # A container may see its own group at the root, under a path that is the host's.
        for folder in (inside, *(parent for parent in inside.parents if parent.is_relative_to(base))):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None and limit < 2**60:  # larger ones mean that there is none
                yield Memory(limit, limit - used + _reclaimable(folder))


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None


def _reclaimable(folder: Path) -> float:
    """Bytes of files that were read and are kept as long as there is room."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    return float(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def processes_here(processes: int) -> int:
    """How many of a group's processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))
