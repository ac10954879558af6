"""The processes that decode files: how they are started, waited for, and woken after a stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ssl_pipeline.config.timeout import Patience, timeout_seconds

T = TypeVar("T")
_PREFETCH = 2


def read_items(
    dataset: Dataset[T], workers: int, pin_memory: bool, sampler: Sequence[int] | None = None
) -> Iterator[T]:
    """The items of a data set, in order, made by workers ahead of time.

    The loader's own time-out is an interval of the system's clock, which goes on while this process is stopped. So it is given
    one tick at a time, and the ticks are counted here.

    Args:
        dataset: an item is a whole batch.
        workers: how many; 0 makes the items in this process.
        pin_memory: whether the items are put into pinned memory.
        sampler: the items' numbers; None for a data set that is iterated over.

    Raises:
        RuntimeError: a worker was killed, or has given nothing for half of the run's timeout.
    """
    patience = Patience(timeout_seconds() / 2)
    options: dict[str, Any] = {}
    if workers:
        options = {
            "prefetch_factor": _PREFETCH,
            "timeout": patience.interval,
            "worker_init_fn": _leave_signals_to_the_process,
        }
    loader = DataLoader(
        dataset, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin_memory, **options
    )
    items = iter(loader)
    while True:
        patience.restart()
        try:
            item = _next(items, patience)
        except StopIteration:
            return
        yield item


def wake_workers() -> None:
    """Continues this process's children that were stopped along with it: whoever woke it may have forgotten them."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)


def _next(items: Iterator[T], patience: Patience) -> T:
    """The next item, asked for again at each tick; a loader that timed out is as it was before."""
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


def _leave_signals_to_the_process(worker: int) -> None:
    """A batch system signals all processes of a job, a terminal too: the run wants to save then, with its workers alive."""
    del worker
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
