"""A process or worker that was killed or hangs: the others report it in one sentence and exit instead of waiting forever.

Three waits are guarded. A data worker that dies raises torch's own error, which :func:`explain` puts into words; one that hangs
is killed by :class:`Watchdog`; and :func:`watch_group` ends a process on CPUs that waits too long for the rest of its group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from datetime import timedelta
from itertools import count
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from ssl_pipeline.config.base import UserError
from ssl_pipeline.config.command import EXIT_CODES, LOST, exit_with_error
from ssl_pipeline.config.timeout import VARIABLE, Patience, timeout_seconds
from ssl_pipeline.data.workers import free_shared_memory, wake_workers
from ssl_pipeline.engine.launcher import save_with_launcher
from ssl_pipeline.engine.signals import StoppedError, install_signal_handlers, looping

# gloo's own timeout counts a stopped group's sleep (Ctrl-Z) as waiting, so it is set out of reach; `watch_group` counts instead.
NEVER = timedelta(days=30)
T = TypeVar("T")
_Store: Any = dist.TCPStore  # type: ignore[attr-defined]
_SECONDS_FOR_ROLL_CALL = 3.0
_SECONDS_AFTER_LOADER = 1.0  # the loader's own timeout comes first: nothing has to be killed for it
_LITTLE_ROOM = 2**20
_IDLE_SHARE = 0.05  # of a tick that a thread may compute and still count as waiting
_OF_TORCH = ("torch", "accelerate")
_OF_WORKERS = re.compile(r"DataLoader (worker|timed out)")
_OF_PROCESSES = re.compile(
    r"gloo/|NCCL|Connection (closed|reset) by peer|Timed out waiting|Broken pipe|remote process|ProcessGroup"
)
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")


class LostProcessError(UserError):
    """Another process, or a worker, was killed or does not answer; ``what`` starts the sentence."""

    exit_code = LOST
    everywhere = False

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. This process leaves, too. What was saved before is whole: `resume=auto` continues from the last checkpoint."
        )


def explain(error: BaseException, step: int | None = None) -> LostProcessError | None:
    """Torch's error about a lost process or worker, in words; None if it is about something else.

    Args:
        error: raised by a step, or by data.
        step: the steps done, where known.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not (_OF_WORKERS.search(text) or _OF_PROCESSES.search(text)):
        return None
    when = "" if step is None else f" in step {step + 1}"
    if _OF_WORKERS.search(text):
        return _lost_worker("timed out" in text, when)
    if _TIMED_OUT.search(text):
        return LostProcessError(f"{_who_hangs()}{when}")
    return LostProcessError(f"{_who()} was killed, or left by a mistake of its own{when}")


def guard_dataloader(batches: Iterator[T], step: int, workers: int) -> Generator[T]:
    """A loader's batches from ``step`` on; failures of its ``workers`` processes become :class:`LostProcessError`."""
    watchdog = Watchdog() if workers else None
    try:
        with looping():
            for batch in batches if watchdog is None else watchdog.watched(batches):
                yield batch
                step += 1
    except UserError as error:
        error.everywhere = False  # only this process knows what is wrong with its data
        raise
    except RuntimeError as error:
        barked = watchdog is not None and watchdog.barked
        lost = _lost_worker(True, f" in step {step + 1}") if barked else explain(error, step)
        _end_workers()  # one that hangs would keep the interpreter from exiting
        if lost is None:
            raise
        raise lost from error
    except (ConnectionError, EOFError) as error:  # the worker that was to hand over this batch's memory is gone
        if watchdog is None or (str(error).startswith("Caught") and not watchdog.barked):
            raise
        _end_workers()
        if watchdog.barked:
            raise _lost_worker(True, f" in step {step + 1}") from error
        raise LostProcessError(f"a worker that decodes files was killed in step {step + 1}") from error


class Watchdog:
    """Kills this process's workers when a batch takes longer than half of the run's timeout.

    The loader's own timeout covers batches that were announced. A worker that stops later, while handing over shared memory,
    blocks the process at a socket without end; killing the worker wakes it.

    A thread watches the clock, except for the first batch: workers are forked for it, which does not go together with threads.
    There an alarm does it, if this is the main thread and nobody else has set one.

    Attributes:
        barked: whether it has killed them.
    """

    def __init__(self) -> None:
        self.barked = False
        self._patience = Patience(timeout_seconds() / 2 + _SECONDS_AFTER_LOADER)
        self._wait = 0  # the number of the current wait; 0 while there is none
        self._over = threading.Event()

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        with self._alarm():
            first = next(batches, None)
        if first is None:
            return
        yield first
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            for number in count(1):
                self._wait = number
                batch = next(batches, None)
                self._wait = 0
                if batch is None:
                    return
                yield batch
        finally:
            self._over.set()

    def _watch(self) -> None:
        seen = 0
        while not self._over.wait(self._patience.interval) and not self.barked:
            wait = self._wait
            self._tick()
            if wait != seen:
                self._patience.restart()
            elif wait:
                self._bark_if_over()
            seen = wait

    def _tick(self) -> None:
        if self._patience.tick():
            wake_workers()

    def _bark_if_over(self) -> None:
        if self._patience.over and not self.barked:
            self.barked = True
            for worker in multiprocessing.active_children():
                worker.kill()

    def _alarmed(self, *_: object) -> None:
        self._tick()
        self._bark_if_over()

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            yield
            return
        before = signal.signal(signal.SIGALRM, self._alarmed)
        self._patience.restart()
        signal.setitimer(signal.ITIMER_REAL, self._patience.interval, self._patience.interval)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def watch_group() -> None:
    """Ends this process, of a group on CPUs, when the calling thread waits for the others longer than the run's timeout.

    NCCL keeps its own timeout: its waits keep the processor busy, and can't be told from work.
    """
    threading.Thread(target=_watch_thread, args=(threading.get_ident(),), name="group", daemon=True).start()


def _watch_thread(watched: int) -> None:
    patience, clock = Patience(timeout_seconds()), time.pthread_getcpuclockid(watched)
    computed = time.clock_gettime(clock)
    while not patience.over:
        time.sleep(patience.interval)
        patience.tick()
        before, computed = computed, time.clock_gettime(clock)
        idle = computed - before < _IDLE_SHARE * patience.interval
        if not idle or not waits_in_torch(sys._current_frames().get(watched)):
            patience.restart()
    with contextlib.suppress(SystemExit):
        exit_with_error(LostProcessError(_who_hangs()))
    for process in multiprocessing.active_children():
        process.kill()
    _exit(LOST)


def waits_in_torch(frame: FrameType | None) -> bool:
    """Whether an idle thread waits for other processes: it is inside of torch, and not at its loader."""
    module = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in _OF_TORCH and not module.startswith("torch.utils.data")


@contextlib.contextmanager
def command_process() -> Iterator[None]:
    """Around a stage's whole command: signals save the run, and a process of a group exits cleanly.

    A finished group waits for its last process, then exits without the interpreter's own end: there torch's threads abort now
    and then (in two of six bare torchrun runs, measured with gloo), and a finished run would be reported as failed. After an
    error nothing is waited for: the others would not come.
    """
    install_signal_handlers()
    save_with_launcher()
    code, together = 0, True
    try:
        yield
    except BaseException as error:
        lost = explain(error)
        if lost is not None:
            with contextlib.suppress(SystemExit):
                exit_with_error(lost)
        if not (dist.is_available() and dist.is_initialized()):
            if lost is not None:
                raise SystemExit(1) from None
            raise
        code, together = 1, False
        if isinstance(error, SystemExit):
            code = int(error.code or 0) if error.code is None or isinstance(error.code, int) else 1
            # What `exit_with_error` has reported; all processes have it where a signal ended the loop.
            reported = error.__context__
            together = code == 0 or isinstance(reported, StoppedError) or getattr(reported, "together", False)
        elif lost is None:
            traceback.print_exc()
    if not (dist.is_available() and dist.is_initialized()):
        return
    if not together:
        _end_workers()
        _exit(code)
    dist.barrier()
    dist.destroy_process_group()
    # Under `launch/run` the code is written down already, and a launcher in between would report a failure.
    _exit(0 if EXIT_CODES in os.environ else code)


def _who() -> str:
    silent = _silent_processes()
    return f"process(es) {', '.join(map(str, silent))}" if silent else "another process"


def _who_hangs() -> str:
    return f"{_who()} has not answered within {timeout_seconds():g} s ({VARIABLE})"


def _silent_processes() -> list[int]:
    """The ranks that don't answer a roll call; empty where the store that the group met by is gone."""
    if not dist.is_initialized():
        return []
    try:
        store = _Store(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=_SECONDS_FOR_ROLL_CALL),
        )  # fmt: skip
        store.set(f"alive {dist.get_rank()}", "yes")
    except (KeyError, RuntimeError):
        return []
    silent, until = [], time.monotonic() + _SECONDS_FOR_ROLL_CALL
    for rank in range(dist.get_world_size()):
        try:
            store.wait([f"alive {rank}"], timedelta(seconds=max(0.01, until - time.monotonic())))
        except RuntimeError:
            silent.append(rank)
    return silent


def _lost_worker(hangs: bool, when: str) -> LostProcessError:
    room = free_shared_memory()
    full = room is not None and room < _LITTLE_ROOM
    cause = "; /dev/shm is full: in Docker start the container with a larger `--shm-size`" if full else ""
    what = "was killed (by the system, if memory was short: lower `num_workers` then)"
    if hangs:
        what = f"has given nothing for {timeout_seconds() / 2:g} s (half of {VARIABLE}), so it hangs"
    return LostProcessError(f"a worker that decodes files {what}{cause}{when}")


def _end_workers() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, before)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
