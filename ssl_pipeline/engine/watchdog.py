"""Workers that keep their process waiting are killed, so that it wakes up and can tell it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from ssl_pipeline.config.timeout import timeout_seconds

T = TypeVar("T")
# The loader's own time-out is to come first: what it says is as good, and nothing has to be killed for it.
_SECONDS_LATER = 1.0
_MOST_SECONDS_BETWEEN_LOOKS = 1.0


class Watchdog:
    """Kills this process's workers when a batch is waited for longer than half the run's patience.

    The loader's time-out looks for batches that are announced. A worker that is stopped after that, and before it has handed
    over the batch's memory, lets the process wait at a socket without an end; when it is dead, the wait is over.

    A thread looks at the clock, but for the first batch: the workers are forked for it, with which threads do not go
    together. An alarm does it there, where nobody else has set one and this is the main thread, which alone may.

    Attributes:
        barked: whether it has killed them.
    """

    def __init__(self) -> None:
        self.barked = False
        self._patience = timeout_seconds() / 2 + _SECONDS_LATER
        self._asked: float | None = None
        self._over = threading.Event()

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches."""
        with self._alarm():
            first = next(batches, None)
        if first is None:
            return
        yield first
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            self._asked = time.monotonic()
            for batch in batches:
                self._asked = None
                yield batch
                self._asked = time.monotonic()
        finally:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(_MOST_SECONDS_BETWEEN_LOOKS, self._patience / 4)):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > self._patience:
                self._bark()
                return

    def _bark(self) -> None:
        self.barked = True
        for worker in multiprocessing.active_children():
            worker.kill()

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            yield
            return
        before = signal.signal(signal.SIGALRM, lambda *_: self._bark())
        signal.setitimer(signal.ITIMER_REAL, self._patience)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
