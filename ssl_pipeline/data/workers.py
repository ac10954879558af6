"""The processes that decode files: how they are started, waited for, and woken after a stop."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_pipeline.config.timeout import Patience, timeout_seconds
from ssl_pipeline.data.bad_files import warn_once

T = TypeVar("T")
_PREFETCH = 2
_SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share; Docker gives it 64 MB


def read_items(
    dataset: Dataset[T], workers: int, pin_memory: bool, item_bytes: int, sampler: Sequence[int] | None = None
) -> Iterator[T]:
    """The items of a dataset, each a whole batch, in order, made by workers ahead of time.

    Items come through shared memory, or through pipes if that has too little room, which copies them once more. The loader's
    own timeout is measured by a clock that runs on while this process is stopped, so it gets one tick at a time, and ticks
    are counted here.

    Args:
        dataset: the batches.
        workers: how many; 0 makes the items in this process.
        pin_memory: whether items are put into pinned memory.
        item_bytes: about how large an item is.
        sampler: the items' numbers; None for a dataset that is iterated over.

    Raises:
        RuntimeError: a worker was killed, or has given nothing for half of the run's timeout.
    """
    patience = Patience(timeout_seconds() / 2)
    options: dict[str, Any] = {"batch_size": None, "sampler": sampler, "num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": _PREFETCH, "timeout": patience.interval, "worker_init_fn": _ignore_signals}
    piped = workers > 0 and not _fits_shared_memory(item_bytes, workers)
    if piped:
        options["collate_fn"] = _as_arrays
    items = iter(DataLoader(dataset, **options))
    while True:
        patience.restart()
        try:
            item = _next(items, patience)
        except StopIteration:
            return
        yield _with(item, torch.from_numpy, np.ndarray) if piped else item


def free_shared_memory() -> int | None:
    """Free bytes of shared memory; None where that is not known."""
    try:
        room = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


def shared_memory_needed(item_bytes: int, workers: int, processes: int) -> int:
    """Bytes that items take in it on all processes of a machine: those made ahead and one in use.

    Twice that, for a second side's workers and for what is not known here.
    """
    return 2 * processes * item_bytes * (_PREFETCH * workers + 1)


def wake_workers() -> None:
    """Continues this process's stopped children: whoever woke this process may have forgotten them."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)


def _next(items: Iterator[T], patience: Patience) -> T:
    """The next item, asked for again at each tick; a timeout changes nothing in torch's loader."""
    while True:
        try:
            return next(items)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if patience.tick():
                wake_workers()
            if patience.over:
                raise


def _fits_shared_memory(item_bytes: int, workers: int) -> bool:
    room = free_shared_memory()
    needed = shared_memory_needed(item_bytes, workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if room is None or needed <= room:
        return True
    wanted = -(-needed // 2**20)
    warn_once(
        f"{_SHARED_MEMORY} has {room // 2**20} MB of room, and the workers want {wanted} MB: their batches come through pipes, "
        f"which is a little slower. In Docker start the container with `--shm-size={max(1024, 2 * wanted)}m`, or with `--ipc=host`."
    )
    return False


def _as_arrays(item: T) -> T:
    """An item for a pipe: arrays are pickled whole."""
    return _with(item, Tensor.numpy, Tensor)


def _with(item: T, change: Callable[[Any], Any], kind: type) -> T:
    """An item with its attributes of a kind, alone or in lists, changed; an error stays."""
    if isinstance(item, BaseException):
        return item
    changed = copy.copy(item)
    for name, value in vars(item).items():
        if isinstance(value, kind):
            setattr(changed, name, change(value))
        elif isinstance(value, list) and value and isinstance(value[0], kind):
            setattr(changed, name, [change(part) for part in value])
    return changed


def _ignore_signals(worker: int) -> None:
    """Batch systems and terminals signal all processes of a job: the run wants to save then, with its workers alive."""
    del worker
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
