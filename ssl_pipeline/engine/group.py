"""A process of a group on CPUs that waits for the others too long says so, and leaves.

gloo has a time-out of its own, which goes by the system's clock: a group that was stopped as one, by Ctrl-Z or with its machine,
would die when it is woken. So gloo's is set so long that it never comes, and the waiting is counted here, in ticks, while
this process runs. NCCL keeps its time-out: its waits keep the processor busy, and can't be told from work.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

from ssl_pipeline.config.timeout import Patience, timeout_seconds

NEVER = timedelta(days=30)
_IDLE_SHARE = 0.05  # of a tick that a thread may compute and still count as waiting
_OF_TORCH = ("torch", "accelerate")


def watch_group(leave: Callable[[], None]) -> None:
    """Watches the calling thread until the process ends.

    Args:
        leave: called from another thread when the calling one has waited for other processes longer than the run's timeout.
    """
    watched = threading.get_ident()
    threading.Thread(target=_watch, args=(watched, leave), name="group", daemon=True).start()


def _watch(watched: int, leave: Callable[[], None]) -> None:
    patience, clock = Patience(timeout_seconds()), time.pthread_getcpuclockid(watched)
    computed = time.clock_gettime(clock)
    while not patience.over:
        time.sleep(patience.interval)
        patience.tick()
        before, computed = computed, time.clock_gettime(clock)
        idle = computed - before < _IDLE_SHARE * patience.interval
        if not idle or not waits_in_torch(sys._current_frames().get(watched)):
            patience.restart()
    leave()


def waits_in_torch(frame: FrameType | None) -> bool:
    """Whether a thread that computes nothing waits for other processes: it is inside of torch, and not at its loader."""
    room = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return room.split(".")[0] in _OF_TORCH and not room.startswith("torch.utils.data")
