"""Workers that keep their process waiting are killed, so that it wakes up and can tell it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

from ssl_pipeline.config.timeout import Patience, timeout_seconds
from ssl_pipeline.data.workers import wake_workers

T = TypeVar("T")
# The loader's own time-out is to come first: what it says is as good, and nothing has to be killed for it.
_SECONDS_LATER = 1.0


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
        self._patience = Patience(timeout_seconds() / 2 + _SECONDS_LATER)
        self._wait = 0  # the number of the wait that goes on; 0 while there is none
        self._over = threading.Event()

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        with self._alarm():
            first = next(batches, None)
        if first is None:
            return
        yield first
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
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
            elif wait and self._patience.over:
                self._bark()
            seen = wait

    def _tick(self) -> None:
        if self._patience.tick():
            wake_workers()

    def _alarmed(self) -> None:
        self._tick()
        if self._patience.over and not self.barked:
            self._bark()

    def _bark(self) -> None:
        self.barked = True
        for worker in multiprocessing.active_children():
            worker.kill()

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            yield
            return
        before = signal.signal(signal.SIGALRM, lambda *_: self._alarmed())
        self._patience.restart()
        signal.setitimer(signal.ITIMER_REAL, self._patience.interval, self._patience.interval)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
