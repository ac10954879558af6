"""Work for several processes: one for each GPU, or one of one thread for each core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.study.cell import CellRunner, FeatureJob, TrainJob

_desk: list[CellRunner] = []  # of a worker process


def num_jobs(asked: int | None, pieces: int) -> int:
    """How many processes: what was asked for, or as many as there are GPUs, or cores; never more than pieces of work."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(asked or torch.cuda.device_count() or cores, pieces))


def run_jobs(work: Sequence[FeatureJob | TrainJob], processes: int) -> Iterator[str]:
    """Does all of it, and says of each piece what it was as soon as it is done.

    Raises:
        ConfigError: a piece of work can't be done, or a process was killed.
    """
    if processes == 1:
        desk = CellRunner()
        yield from map(desk.run, work)
        return
    # Spawned: a forked process inherits locks of torch's threads, and can't use CUDA.
    context = multiprocessing.get_context("spawn")
    devices: Any = context.Queue()
    for place in range(processes):
        devices.put(place)
    with ProcessPoolExecutor(processes, context, _begin, (devices,)) as pool:
        try:
            with _deaf_to_interrupts():
                coming = [pool.submit(_run, piece) for piece in work]
            for done in as_completed(coming):
                yield done.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a process of the study was killed, most likely for want of memory: start the same command again, which does what "
                "is missing, with fewer `jobs`."
            ) from None
        except UserError as error:
            raise ConfigError(str(error).split("\n")) from error
        except (KeyboardInterrupt, GeneratorExit):  # what they are at is not kept, so that nothing is worth waiting for
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started in here never hear a terminal's Ctrl-C: it is the study's, which ends them.

    The mask is what they inherit. It does not keep the study itself from being interrupted amid a start, which would leave a
    child without the rest of its message: the kernel hands the signal to any thread of ours, and Python's handler runs in the
    main one whatever its mask. So the handler waits too.
    """
    main = threading.current_thread() is threading.main_thread()
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
            if came:
                signal.raise_signal(signal.SIGINT)


def _begin(devices: Any) -> None:
    """A worker's start: its device, one thread, and an end when the study itself is killed."""
    place = devices.get()
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _visible(place: int) -> str:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    return names[place % len(names)]


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(piece: FeatureJob | TrainJob) -> str:
    if not _desk:
        _desk.append(CellRunner())
    return _desk[0].run(piece)
