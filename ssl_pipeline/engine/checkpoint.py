"""A run's own resume state: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ssl_pipeline.config.base import ConfigError

_NAME = "step-"


class Checkpoints:
    """The checkpoints of a run, in its folder.

    A checkpoint is written under a temporary name, flushed to the disk and renamed, and only then are older ones
    removed: at every instant after the first, a complete one exists.

    Args:
        folder: where they are kept.
        every: steps between two; None for the end only.
        keep: how many to keep.
        main: whether this process writes.
        data: the data's fingerprint: a run is continued on the data that it was started on.
    """

    def __init__(self, folder: Path, data: str, every: int | None = None, keep: int = 2, main: bool = True) -> None:
        self.folder, self.data, self.every, self.keep, self.main = folder, data, every, keep, main

    def due(self, done: int, total: int) -> bool:
        """Whether one is due after ``done`` steps."""
        return done == total or (self.every is not None and done % self.every == 0)

    def save(self, done: int, state: dict[str, Any]) -> None:
        """Writes the state after ``done`` steps: tensors, numbers, strings and containers of them."""
        if not self.main:
            return
        self.folder.mkdir(exist_ok=True)
        temporary, final = self.folder / f".{_NAME}{done:09d}.pt", self.folder / f"{_NAME}{done:09d}.pt"
        with temporary.open("wb") as file:
            torch.save({"done": done, "data": self.data, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        for old in self._complete()[: -self.keep]:
            old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The state of the last complete checkpoint, or None.

        Raises:
            ConfigError: it can't be read, or belongs to other data.
        """
        found = self._complete()
        if not found:
            return None
        try:
            state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
        except Exception as error:
            raise ConfigError(
                f"the checkpoint {found[-1]} can't be read ({type(error).__name__}): remove it to continue from the one before."
            ) from error
        if state["data"] != self.data:
            raise ConfigError(
                f"the run in {self.folder.parent} was started on other data (the images or labels have changed since): "
                "restore them, or start a new run with another `output`."
            )
        return state

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_NAME}*.pt"))
