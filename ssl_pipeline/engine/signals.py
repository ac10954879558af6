"""SIGTERM and SIGUSR1: the run is saved at the end of its step, on all processes alike, and left calmly.

A handler only notes the signal. Processes agree on it in the exchange that every step has anyway (``engine/numbers.py``), so
that one which was told a step earlier than the others does not wait for them in vain. Nor does an evaluation hold a run up:
one that lasts is cut short, where processes exchange its parts, and made up for by the run that goes on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ssl_pipeline.config.base import UserError

FILE_NAME = "requeue"
HEARD = (signal.SIGTERM, signal.SIGUSR1)
# Batch systems and launchers pass one request on by several ways: what comes within this time is the same one.
_SECONDS_OF_ONE_REQUEST = 5.0
# Launchers kill what is there half a minute after the signal: an evaluation that is nearly done is worth a part of that.
_SECONDS_FOR_AN_EVALUATION = 8.0
_NONE = 0
_first: tuple[int, float] | None = None


class StoppedError(UserError):
    """A signal has ended the run; its state is saved where it has checkpoints.

    Attributes:
        number: the signal's.
        saved: whether it can be continued.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: what batch scripts start again

    def __init__(self, number: int, done: int, total: int, saved: bool) -> None:
        self.number, self.saved = number, saved
        after = f"stopped by {signal.Signals(number).name} after step {done} of {total}"
        told = "its state is saved, `resume=auto` continues from it." if saved else "this run keeps no checkpoints."
        super().__init__(f"{after}: {told}")
        if not saved:
            self.exit_code = 128 + number


class CutShortError(StoppedError):
    """A signal has ended an evaluation that lasts, on all processes; outside of the loop there is nothing to save."""

    def __init__(self, number: int) -> None:
        self.number, self.saved = number, True
        UserError.__init__(
            self,
            f"stopped by {signal.Signals(number).name} in an evaluation: `resume=auto` goes on from what is saved.",
        )


def listen() -> None:
    """Notes SIGTERM and SIGUSR1 from now on; one that comes again later leaves at once."""
    for number in HEARD:
        signal.signal(number, _note)


def received() -> int:
    """The number of the signal that this process was sent, 0 for none."""
    return _NONE if _first is None else _first[0]


def overdue() -> int:
    """Like ``received``, once that is so long ago that an evaluation has to give way."""
    late = _first is not None and time.monotonic() - _first[1] > _SECONDS_FOR_AN_EVALUATION
    return received() if late else _NONE


def forget() -> None:
    """As if no signal had come."""
    global _first
    _first = None


@contextmanager
def requeue_marker(folder: Path | None) -> Iterator[None]:
    """Leaves a file ``requeue`` in a run's folder if a signal ends the run, and removes an earlier one.

    Args:
        folder: the run's; None in processes that don't write.
    """
    if folder is not None:
        (folder / FILE_NAME).unlink(missing_ok=True)
    try:
        yield
    except StoppedError as stopped:
        if folder is not None and stopped.saved:
            (folder / FILE_NAME).write_text(f"{stopped}\n", encoding="utf-8")
        raise


def _note(number: int, frame: FrameType | None) -> None:
    global _first
    del frame
    now = time.monotonic()
    if _first is None:
        _first = number, now
    elif now - _first[1] > _SECONDS_OF_ONE_REQUEST:
        os._exit(128 + number)
