"""A mirror in a thread of its own: a step never waits for it, whatever it waits for itself."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_pipeline.config.base import first_line
from ssl_pipeline.logging.jsonl import FILE_NAME

if TYPE_CHECKING:
    from ssl_pipeline.logging.tracker import Logger

_log = logging.getLogger("ssl_pipeline")
_SECONDS_AFTER_A_STOP = 10.0  # of the two minutes that a scheduler gives between its signal and the end
_ROOM = 10_000  # calls that may wait: hours of a run, and a few MB


class AsyncLogger:
    """Starts a mirror and tells it all in one thread, in order.

    What fails, falls behind or never ends costs one warning: the mirror is given up, and the run goes on without it.

    Args:
        name: for the warning.
        start: makes the mirror; may take as long as it likes.
        patience: seconds to wait at the end for what is still to be told.
        room: calls that may wait.
    """

    def __init__(self, name: str, start: Callable[[], Logger], patience: float, room: int = _ROOM) -> None:
        self._name, self._start, self._patience = name, start, patience
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(room)
        self._given_up, self._one_warning = False, threading.Lock()
        # A daemon: a mirror that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"mirror {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        kept = dict(figures)
        self._later(lambda mirror: mirror.log(step, kept))

    def pictures(self, step: int, files: Mapping[str, Path]) -> None:
        kept = dict(files)
        self._later(lambda mirror: mirror.pictures(step, kept))

    def alert(self, title: str, text: str) -> None:
        self._later(lambda mirror: mirror.alert(title, text))

    def made(self, folder: Path) -> None:
        self._later(lambda mirror: mirror.made(folder))

    def used(self, folder: Path) -> None:
        self._later(lambda mirror: mirror.used(folder))

    def finish(self, failed: bool) -> None:
        """Waits until all is told, but not for ever; of a run that failed or was stopped no longer than a scheduler would bear."""
        patience = min(self._patience, _SECONDS_AFTER_A_STOP) if failed else self._patience
        self._later(lambda mirror: mirror.finish(failed))
        self._later(None)
        if self._given_up:
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            self._give_up(f"was not done {patience:g} s after the run's end")

    def _later(self, call: Callable[[Logger], None] | None) -> None:
        if self._given_up:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"is {self._calls.maxsize} calls behind")

    def _work(self) -> None:
        try:
            mirror = self._start()
            while (call := self._calls.get()) is not None and not self._given_up:
                call(mirror)
        except Exception as error:
            self._give_up(f"failed ({first_line(error)})")

    def _give_up(self, why: str) -> None:
        with self._one_warning:
            told, self._given_up = self._given_up, True
        if not told:
            _log.warning("%s %s and is left out; %s holds everything", self._name, why, FILE_NAME)
