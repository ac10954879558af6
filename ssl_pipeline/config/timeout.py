"""How long a run waits for a process or a worker that does not answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ssl_pipeline.config.base import ConfigError

VARIABLE = "SSL_PIPELINE_TIMEOUT"
_MAX_SECONDS_BETWEEN_TICKS = 1.0
_SECONDS_LATE = 2.0  # a busy machine delays a tick; what delays it longer has stopped the process


def timeout_seconds() -> float:
    """Seconds to wait for another process: ``SSL_PIPELINE_TIMEOUT``, by default ten minutes.

    Workers get half of it, so that the process that knows what is wrong reports it first.

    Raises:
        ConfigError: the variable is no number above 0.
    """
    text = os.environ.get(VARIABLE, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{VARIABLE} is {text!r}: give the seconds to wait for a process that does not answer.")
    return seconds


class Patience:
    """A timeout that leaves out the time in which this process itself was stopped.

    After Ctrl-Z, SIGSTOP or a paused container the clock has gone on, although no process could answer. Call :meth:`tick` at
    every ``interval`` seconds: a tick that comes much too late shows that the process was stopped.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = min(_MAX_SECONDS_BETWEEN_TICKS, seconds / 4)
        self._seconds, self._clock = seconds, clock
        self.restart()

    def restart(self) -> None:
        self._last, self._waited = self._clock(), 0.0

    def tick(self) -> bool:
        """Counts the time since the last tick, or starts anew and returns True if the process was stopped since then."""
        now = self._clock()
        passed, self._last = now - self._last, now
        stopped = passed > self.interval + _SECONDS_LATE
        self._waited = 0.0 if stopped else self._waited + min(passed, 2 * self.interval)
        return stopped

    @property
    def over(self) -> bool:
        return self._waited > self._seconds
