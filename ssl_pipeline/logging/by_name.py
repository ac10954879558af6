"""Mirrors by name, TensorBoard above all: whatever Accelerate has a tracker for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.logging.names import TRAINING_STEP

_NEEDED = {"tensorboard": "tensorboard"}  # our extras; of the other trackers a user brings the package


class AccelerateLogger:
    """One of Accelerate's trackers. It hears figures and pictures; of artifacts and alerts it knows nothing."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """The figures after ``step`` steps; those of stage two's trainings have a step of their own."""
        self._tracker.log(dict(figures), step=int(figures.get(TRAINING_STEP, step)))

    def pictures(self, step: int, files: Mapping[str, Path]) -> None:
        """The pictures, to trackers that take some."""
        import numpy as np
        from PIL import Image

        if not hasattr(self._tracker, "log_images"):
            return
        for name, file in files.items():
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            options = {"dataformats": "NHWC"} if self._tracker.name == "tensorboard" else {}
            self._tracker.log_images({name: pixels}, step=step, **options)

    def alert(self, title: str, text: str) -> None:
        """Left to the terminal and the log."""
        del title, text

    def made(self, folder: Path) -> None:
        del folder

    def used(self, folder: Path) -> None:
        del folder

    def finish(self, failed: bool) -> None:
        """Writes what is left."""
        del failed
        self._tracker.finish()


def check_names(names: Sequence[str]) -> None:
    """Refuses names that no tracker has, and those whose package is not installed.

    Raises:
        ConfigError: naming each.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) != "wandb")
    installed = {str(name) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name not in known:
            problems.append(
                f"`tracking.mirrors`: {name!r} is none of {', '.join(known)} (W&B is chosen by `tracking=wandb`)."
            )
        elif name not in installed:
            install = f"-e '.[{_NEEDED[name]}]' in the project's folder" if name in _NEEDED else name
            problems.append(f"`tracking.mirrors`: {name} is not installed: pip install {install}")
    if problems:
        raise ConfigError(problems)


def open_by_name(name: str, folder: Path, config: dict[str, Any]) -> AccelerateLogger:
    """Starts a tracker by its name; those that write files write into ``folder/name``."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    make = LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": str(folder)} if make.requires_logging_directory else {}
    # Accelerate asks its state which process this is, and a mirror lives in the main one alone.
    tracker = make(name, **where)
    tracker.start()
    if name != "tensorboard":  # it makes a second run of the hyperparameters; config.yaml lies beside it
        tracker.store_init_configuration({key: str(value) for key, value in config.items()})
    return AccelerateLogger(tracker)
