"""SIGTERM, SIGUSR1 and Ctrl-C: the run is saved at the end of its step, on all processes alike, and left calmly.

A handler only notes the signal. Processes agree on it in the exchange that every step has anyway (``engine/train_state.py``), so
that one which receives it a step earlier does not wait for the others in vain. A long evaluation is cut short where processes
exchange its parts, and repeated by the run that continues.

Ctrl-C (SIGINT) outside of the loop is a KeyboardInterrupt, as always in Python: there is nothing to save. A second one ends a
command at once; in a notebook it is a KeyboardInterrupt.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ssl_pipeline.config.base import StoppedByHand, UserError

FILE_NAME = "requeue"
HEARD = (signal.SIGTERM, signal.SIGUSR1)
# Batch systems and launchers send one request in several ways: signals within this time are the same one.
_SECONDS_OF_ONE_REQUEST = 5.0
# Launchers kill half a minute after the signal: an evaluation that is nearly done may use a part of that.
_SECONDS_FOR_AN_EVALUATION = 8.0
_first: tuple[int, float] | None = None
_loops = 0  # running in this process


class StoppedError(UserError):
    """A signal has ended the run; its state is saved if it keeps checkpoints.

    Attributes:
        number: the signal's.
        saved: whether the run can be continued.
        after: how far it came, as the start of a sentence.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: what batch scripts start again

    def __init__(self, number: int, done: int, total: int, saved: bool) -> None:
        self.number, self.saved = number, saved
        self.after = after = f"stopped by {_name(number)} after step {done} of {total}"
        state = "its state is saved, `resume=auto` continues from it." if saved else "this run keeps no checkpoints."
        super().__init__(f"{after}: {state}")
        if not saved or number == signal.SIGINT:
            self.exit_code = 128 + number


class CutShortError(StoppedError):
    """A signal has ended a long evaluation, on all processes; outside of the loop there is nothing to save."""

    def __init__(self, number: int) -> None:
        self.number, self.saved, self.after = number, True, f"stopped by {_name(number)} in an evaluation"
        UserError.__init__(self, f"{self.after}: `resume=auto` goes on from what is saved.")
        if number == signal.SIGINT:
            self.exit_code = 128 + number


def install_signal_handlers() -> None:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C from now on; one that comes again later ends the process at once."""
    for number in (*HEARD, signal.SIGINT):
        signal.signal(number, _note)


def pending_signal() -> int:
    """The number of the signal that this process was sent, 0 for none."""
    return 0 if _first is None else _first[0]


def overdue() -> int:
    """Like ``pending_signal``, once an evaluation has to stop: some time after a batch system's signal, at once after Ctrl-C."""
    if _first is None or (not _loops and _first[0] == signal.SIGINT):
        return 0
    number, since = _first
    late = number == signal.SIGINT or time.monotonic() - since > _SECONDS_FOR_AN_EVALUATION
    return number if late else 0


def reset_signals() -> None:
    """Forgets a signal that has come."""
    global _first
    _first = None


@contextmanager
def looping() -> Iterator[None]:
    """Around a training loop: Ctrl-C is noted, and acted on at the end of the step."""
    global _loops
    _loops += 1
    try:
        yield
    finally:
        _loops -= 1


@contextmanager
def handle_signals(folder: Path | None) -> Iterator[None]:
    """Around a run's work: Ctrl-C saves it, and a signal that ends it leaves a file ``requeue`` in its folder.

    A handler is set if there is none yet (in a notebook), in the main thread alone, and removed at the end.

    Args:
        folder: the run's; None on rank > 0.

    Raises:
        StoppedByHand: Ctrl-C has ended the run, on all processes.
        StoppedError: another signal has.
    """
    if folder is not None:
        (folder / FILE_NAME).unlink(missing_ok=True)
    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if ours:
        reset_signals()
        signal.signal(signal.SIGINT, _note_interrupt)
    try:
        yield
    except StoppedError as stopped:
        if stopped.number == signal.SIGINT:
            saved = "its state is saved" if stopped.saved else "this run keeps no checkpoints"
            raise StoppedByHand(f"{stopped.after}, {saved}", folder, together=True) from None
        if folder is not None and stopped.saved:
            (folder / FILE_NAME).write_text(f"{stopped}\n", encoding="utf-8")
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
            reset_signals()


def _note(number: int, frame: FrameType | None) -> None:
    """A command's handler."""
    del frame
    if _first is None:
        _note_first(number)
    elif time.monotonic() - _first[1] > _seconds_of_one_request(number):
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(128 + number)


def _note_interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C where a run is called from Python."""
    del frame
    if _first is not None:
        raise KeyboardInterrupt
    _note_first(number)


def _note_first(number: int) -> None:
    """Ctrl-C waits for the end of a loop's step, or goes up through everything else."""
    global _first
    _first = number, time.monotonic()
    if number != signal.SIGINT:
        return
    if not _loops:
        raise KeyboardInterrupt
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\nsaving at the end of this step; a second Ctrl-C leaves at once\n")


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _seconds_of_one_request(number: int) -> float:
    """A terminal's Ctrl-C is passed on by a launcher of several processes alone."""
    return 0.0 if number == signal.SIGINT and "LOCAL_RANK" not in os.environ else _SECONDS_OF_ONE_REQUEST
