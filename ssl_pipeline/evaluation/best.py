"""The encoder that scored best on ``dev`` while stage one ran; the test set is never asked."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.encoder import Card, Encoder, read, save


class BestEncoder:
    """Keeps it in a folder of its own, which is used as a finished run's: ``finetune encoder=RUN/best``.

    The folder's card is the memory: a run that is continued from before its best step comes to the same figure again, and
    the folder has it already.

    Args:
        folder: where it is kept; made when there is one to keep.
        figure: what it is chosen by; larger is better. Where there is no such figure, nothing is kept.
        main: whether this process writes.
        comparable: whether the figure in the folder was measured as those to come will be.
    """

    def __init__(self, folder: Path, figure: str, main: bool = True, comparable: bool = True) -> None:
        self._folder, self._figure, self._main = folder, figure, main
        self._value = float("-inf")
        if main and comparable and folder.is_dir():
            # An unreadable one is that of a process which was killed when it wrote its first.
            with contextlib.suppress(ConfigError, KeyError):
                self._value = read(folder, "encoder")[0].figures[figure]

    def offer(self, encoder: Encoder, card: Card, done: int) -> None:
        """Keeps the encoder after ``done`` steps if it is better than all before; the earliest of equals."""
        value = card.figures.get(self._figure)
        if not self._main or value is None or not value > self._value:
            return
        self._value = value
        self._folder.mkdir(exist_ok=True)
        save(self._folder, encoder, card.model_copy(update={"figures": card.figures | {"step": float(done)}}))
