"""A process or worker that was killed or hangs: the others tell it in words, and leave without waiting for it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from ssl_pipeline.config.base import UserError
from ssl_pipeline.config.command import EXIT_CODES, LOST, exit_with_error
from ssl_pipeline.config.timeout import VARIABLE, timeout_seconds
from ssl_pipeline.data.workers import free_shared_memory
from ssl_pipeline.engine.signals import StoppedError, looping
from ssl_pipeline.engine.watchdog import Watchdog

_Store: Any = dist.TCPStore  # type: ignore[attr-defined]
T = TypeVar("T")
_SECONDS_FOR_ROLL_CALL = 3.0
_LITTLE_ROOM = 2**20
_OF_WORKERS = re.compile(r"DataLoader (worker|timed out)")
_OF_PROCESSES = re.compile(
    r"gloo/|NCCL|Connection (closed|reset) by peer|Timed out waiting|Broken pipe|remote process|ProcessGroup"
)
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")


class LostProcessError(UserError):
    """Another process, or a worker, was killed or does not answer."""

    exit_code = LOST


def explain(error: BaseException, step: int | None = None) -> LostProcessError | None:
    """What torch's error means in words; None if it is about something else.

    Args:
        error: raised by a step, or by data.
        step: the steps done, where it is known.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not (_OF_WORKERS.search(text) or _OF_PROCESSES.search(text)):
        return None
    when = "" if step is None else f" in step {step + 1}"
    if _OF_WORKERS.search(text):
        what = f"a worker that decodes files {_of_worker('timed out' in text)}{when}"
    else:
        what = (
            f"{_who()} {_hangs() if _TIMED_OUT.search(text) else 'was killed, or left by a mistake of its own'}{when}"
        )
    return _lost(what)


def guard_dataloader(batches: Iterator[T], step: int, workers: int) -> Generator[T]:
    """A process's batches; what goes wrong with its data is known to it alone, so it has to tell it.

    Args:
        batches: from ``step`` on.
        step: the first.
        workers: processes that decode them.
    """
    watchdog = Watchdog()
    try:
        with looping():
            for batch in watchdog.watched(batches) if workers else batches:
                yield batch
                step += 1
    except UserError as error:
        error.everywhere = False
        raise
    except RuntimeError as error:
        lost = _hanging_worker(step) if watchdog.barked else explain(error, step)
        _end_workers()  # one that hangs would keep the interpreter from leaving
        if lost is None:
            raise
        raise lost from error
    except (ConnectionError, EOFError) as error:  # a batch whose memory was to come from a worker that is gone
        if not workers or (str(error).startswith("Caught") and not watchdog.barked):
            raise
        _end_workers()
        if watchdog.barked:
            raise _hanging_worker(step) from error
        raise _lost(f"a worker that decodes files was killed in step {step + 1}") from error


@contextlib.contextmanager
def clean_distributed_exit() -> Iterator[None]:
    """Around the whole command: a process of a group leaves it whole, or at once when something went wrong.

    A finished group waits for its last process. It leaves without the interpreter's own end: there torch's threads abort
    now and then (in two of six bare torchrun runs, measured with gloo), and a run that had finished would be reported as
    failed. After an error nothing is waited for: the others would not come.
    """
    try:
        yield
    except SystemExit as left:
        stopped = (
            left.__context__
        )  # what `exit_with_error` has told; all processes have it where a signal ended the loop
        if left.code in (0, None) or isinstance(stopped, StoppedError) or getattr(stopped, "together", False):
            # Under `launch/run` the code is written down already, and a launcher in between would report a failure.
            _leave_together(0 if EXIT_CODES in os.environ else int(left.code or 0))
        _leave_alone(left.code if isinstance(left.code, int) else 1)
        raise
    except RuntimeError as error:
        lost = explain(error)
        if lost is None:
            _fail()
            raise
        with contextlib.suppress(SystemExit):
            exit_with_error(lost)
        _leave_alone(1)
        raise SystemExit(1) from None
    except BaseException:
        _fail()
        raise
    _leave_together(0)


def leave_group() -> None:
    """Ends this process from a thread beside one that waits in vain: says for whom, and leaves."""
    with contextlib.suppress(SystemExit):
        exit_with_error(_lost(f"{_who()} {_hangs()}"))
    for process in multiprocessing.active_children():
        process.kill()
    _exit(LOST)


def _who() -> str:
    silent = _silent_processes()
    return f"process(es) {', '.join(map(str, silent))}" if silent else "another process"


def _hangs() -> str:
    return f"has not answered within {timeout_seconds():g} s ({VARIABLE})"


def _lost(what: str) -> LostProcessError:
    lost = LostProcessError(
        f"{what}. This process leaves, too. What was saved before is whole: `resume=auto` continues from the last checkpoint."
    )
    lost.everywhere = False
    return lost


def _silent_processes() -> list[int]:
    """Those that don't answer a roll call; empty where none can be held, for lack of the store that the group met by."""
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


def _of_worker(hangs: bool) -> str:
    room = free_shared_memory()
    full = room is not None and room < _LITTLE_ROOM
    cause = "; /dev/shm is full: in Docker start the container with a larger `--shm-size`" if full else ""
    if hangs:
        return f"has given nothing for {timeout_seconds() / 2:g} s (half of {VARIABLE}), so it hangs{cause}"
    return f"was killed (by the system, if memory was short: lower `workers` then){cause}"


def _hanging_worker(step: int) -> LostProcessError:
    return _lost(f"a worker that decodes files {_of_worker(hangs=True)} in step {step + 1}")


def _end_workers() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, before)


def _fail() -> None:
    if dist.is_available() and dist.is_initialized():
        traceback.print_exc()
        _leave_alone(1)


def _leave_together(code: int) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _exit(code)


def _leave_alone(code: int) -> None:
    if dist.is_available() and dist.is_initialized():
        _end_workers()
        _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
