"""How long a run waits for a process or a worker that does not answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ssl_pipeline.config.base import ConfigError

VARIABLE = "SSL_PIPELINE_TIMEOUT"
_MOST_SECONDS_BETWEEN_TICKS = 1.0
_SECONDS_LATE = 2.0  # a busy machine delays a tick; what delays it longer has stopped the process


def timeout_seconds() -> float:
    """Seconds to wait for another process: ``SSL_PIPELINE_TIMEOUT``, by default ten minutes.

    A worker that decodes files has half of that, so that the process that knows what is wrong is the one that tells it.

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
    """Counts how long something is waited for, and leaves out the time in which this process itself was stopped.

    Ctrl-Z, SIGSTOP, a container or a virtual machine that was paused: the clock goes on, and nobody could have answered. Its user
    calls :meth:`tick` at every ``interval``. A tick that comes much too late shows that the process was stopped.

    Args:
        seconds: that are waited.
        clock: gives seconds.

    Attributes:
        interval: seconds from one tick to the next.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = min(_MOST_SECONDS_BETWEEN_TICKS, seconds / 4)
        self._seconds, self._clock = seconds, clock
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self._last, self._waited = self._clock(), 0.0

    def tick(self) -> bool:
        """Counts the time since the last tick; after a stop the count starts again.

        Returns:
            Whether this process was stopped since the last tick.
        """
        now = self._clock()
        passed, self._last = now - self._last, now
        stopped = passed > self.interval + _SECONDS_LATE
        self._waited = 0.0 if stopped else self._waited + min(passed, 2 * self.interval)
        return stopped

    @property
    def over(self) -> bool:
        """Whether all of the time has been waited."""
        return self._waited > self._seconds
