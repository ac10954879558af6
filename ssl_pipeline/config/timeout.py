"""How long a run waits for a process or a worker that does not answer."""

from __future__ import annotations

import os

from ssl_pipeline.config.base import ConfigError

VARIABLE = "SSL_PIPELINE_TIMEOUT"


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
