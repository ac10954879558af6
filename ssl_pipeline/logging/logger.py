"""Where a run's metrics go: ``metrics.jsonl`` always, and beside it W&B and Accelerate's trackers, each in a thread of its own."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel, first_line
from ssl_pipeline.logging.jsonl import FILE_NAME, TRAINING_STEP, JsonlLogger
from ssl_pipeline.logging.progress import Mode
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import RunFolder

_log = logging.getLogger("ssl_pipeline")
_EXTRAS = ("tensorboard",)  # packages that an extra of ours installs
_SECONDS_AFTER_A_STOP = 10.0  # of the two minutes that a scheduler gives between its signal and the end
_QUEUE_SIZE = 10_000  # calls that may wait: hours of a run, and a few MB


class TrackingConfig(FrozenModel):
    """Where a run's metrics go, beside ``metrics.jsonl``."""

    name: Literal["auto", "wandb", "off"] = Field(
        "auto",
        description="`auto` and `wandb`: W&B, online when a key is there and the server answers, offline otherwise. "
        "`off`: no W&B.",
    )
    loggers: tuple[str, ...] = Field(
        (), description="Further loggers, by the names of Accelerate's trackers, such as `tensorboard`."
    )
    log_images: bool = Field(True, description="Whether views, neighbors and maps are drawn into the run's `media/`.")
    progress: Mode = Field(
        "auto",
        description="`rich`: a bar. `plain`: lines, for a batch system's log. `quiet`: only warnings and errors. "
        "`auto`: a bar in a terminal, lines elsewhere.",
    )
    project: str = Field("ssl_pipeline", description="W&B project.")
    entity: str | None = Field(None, description="W&B user or team.")
    group: str | None = Field(None, description="W&B group of runs.")
    tags: tuple[str, ...] = Field((), description="W&B tags.")
    init_timeout: float = Field(
        20.0,
        gt=0,
        description="Seconds that W&B's server may take to answer before W&B goes offline; training goes on meanwhile.",
    )
    finish_timeout: float = Field(
        120.0, gt=0, description="Seconds that a logger may take at a run's end to send what is left."
    )


class Logger:
    """A logger of one run; what it does not override is ignored."""

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Metrics after ``step`` steps."""

    def log_images(self, step: int, files: Mapping[str, Path]) -> None:
        """PNG files of after ``step`` steps, by name."""

    def alert(self, title: str, text: str) -> None:
        """A message that a person should see at once."""

    def log_model(self, folder: Path) -> None:
        """The encoder that the run made: a folder with ``encoder.safetensors`` and ``card.json``."""

    def use_model(self, folder: Path) -> None:
        """The encoder that the run started from, in such a folder."""

    def finish(self, failed: bool) -> None:
        """The run is over; ``failed``: by an error, or stopped by a person."""


class AsyncLogger:
    """Starts and calls a logger in a thread of its own, in order, so that a training step never waits for it.

    If it fails, falls behind by ``size`` calls or hangs, it is given up with one warning, and the run goes on without it. ``start``
    may take as long as it likes; the run's end waits ``timeout`` seconds for the calls that are left.
    """

    def __init__(self, name: str, start: Callable[[], Logger], timeout: float, size: int = _QUEUE_SIZE) -> None:
        self._name, self._start, self._timeout = name, start, timeout
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(size)
        self._given_up, self._one_warning = False, threading.Lock()
        # A daemon, so that a logger that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def call(self, call: Callable[[Logger], None] | None) -> None:
        """Calls the logger later; None ends its thread."""
        if self._given_up:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"is {self._calls.maxsize} calls behind")

    def finish(self, failed: bool) -> None:
        timeout = min(self._timeout, _SECONDS_AFTER_A_STOP) if failed else self._timeout
        self.call(lambda logger: logger.finish(failed))
        self.call(None)
        if self._given_up:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._give_up(f"was not done {timeout:g} s after the run's end")

    def _work(self) -> None:
        try:
            logger = self._start()
            while (call := self._calls.get()) is not None and not self._given_up:
                call(logger)
        except Exception as error:
            self._give_up(f"failed ({first_line(error)})")

    def _give_up(self, why: str) -> None:
        with self._one_warning:
            warned, self._given_up = self._given_up, True
        if not warned:
            _log.warning("%s %s and is left out; %s holds everything", self._name, why, FILE_NAME)


class AccelerateLogger(Logger):
    """One of Accelerate's trackers, TensorBoard above all; it takes metrics and images.

    W&B's is not one of these: it can't continue a run, fall back to offline, alert, or log a model.
    """

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[name]
        # Not `accelerator.init_trackers`, which would have all processes wait for the start.
        self._tracker = tracker(name, **({"logging_dir": str(folder)} if tracker.requires_logging_directory else {}))
        self._tracker.start()
        if name != "tensorboard":  # it would make a second run of the hyperparameters
            self._tracker.store_init_configuration({key: str(value) for key, value in config.items()})

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        # The loops of stage two have a step of their own.
        self._tracker.log(dict(metrics), step=int(metrics.get(TRAINING_STEP, step)))

    def log_images(self, step: int, files: Mapping[str, Path]) -> None:
        import numpy as np

        if not hasattr(self._tracker, "log_images"):
            return
        options = {"dataformats": "NHWC"} if self._tracker.name == "tensorboard" else {}
        for name, file in files.items():
            with Image.open(file) as image:
                self._tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, **options)

    def finish(self, failed: bool) -> None:
        self._tracker.finish()


class LoggerCollection:
    """``metrics.jsonl`` and the other loggers; no file on ranks above 0, where nothing is logged. ``draws``: images are made."""

    def __init__(self, metrics: JsonlLogger | None, loggers: Sequence[AsyncLogger], draws: bool = False) -> None:
        self._metrics, self._loggers = metrics, list(loggers)
        self.draws = draws and metrics is not None

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Metrics after ``step`` steps."""
        if self._metrics is not None and metrics:
            copied = dict(metrics)  # the loggers read it later
            self._metrics.log(step, copied)
            self._call(lambda logger: logger.log(step, copied))

    def truncate_training(self, step: int) -> None:
        """Drops the lines of stage two's loops beyond one of their steps, which a continued run repeats."""
        if self._metrics is not None:
            self._metrics.truncate_training(step)

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Saves images as ``media/NAME-STEP.png`` in the run's folder, with their paths in ``metrics.jsonl``."""
        if self._metrics is None or not images:
            return
        folder = self._metrics.path.parent
        (folder / "media").mkdir(exist_ok=True)
        files = {f"media/{name}": folder / "media" / f"{name}-{step:08d}.png" for name in images}
        for file, image in zip(files.values(), images.values(), strict=True):
            image.save(file, compress_level=1)  # twice as fast as the default, a tenth larger
        self._metrics.log(step, {name: file.relative_to(folder).as_posix() for name, file in files.items()})
        self._call(lambda logger: logger.log_images(step, files))

    def alert(self, step: int, title: str, text: str) -> None:
        """A sentence that somebody should read at once; W&B sends it on by mail or Slack."""
        if self._metrics is not None:
            self._metrics.log(step, {"alert": title, "text": text})
            self._call(lambda logger: logger.alert(title, text))

    def log_model(self, folder: Path) -> None:
        """The encoder that the run made."""
        self._call(lambda logger: logger.log_model(folder))

    def use_model(self, encoder: str | Path) -> None:
        """The encoder that the run started from: its folder or a file in it; an address elsewhere is ignored."""
        path = Path(encoder)
        folder = path if path.is_dir() else path.parent
        if (folder / "encoder.safetensors").is_file() and (folder / "card.json").is_file():
            self._call(lambda logger: logger.use_model(folder))

    def finish(self, failed: bool = False) -> None:
        """Closes ``metrics.jsonl`` first: the others may wait for a server."""
        if self._metrics is not None:
            self._metrics.finish()
        for logger in self._loggers:
            logger.finish(failed)

    def _call(self, call: Callable[[Logger], None]) -> None:
        for logger in self._loggers:
            logger.call(call)

    def __enter__(self) -> LoggerCollection:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(failed=kind is not None)


def open_loggers(
    run: RunFolder | None, stage: str, config: dict[str, Any], tracking: TrackingConfig, start_step: int
) -> LoggerCollection:
    """The loggers of a run, which get its configuration without secrets; none on ranks above 0, where ``run`` is None.

    ``start_step`` is the last step whose metrics stay, −1 for none; a continued run repeats what was logged after it.

    Raises:
        ConfigError: ``tracking.loggers`` names a tracker that Accelerate does not have, or that is not installed.
    """
    if run is None:
        return LoggerCollection(None, [])
    _check_names(tracking.loggers)
    metrics = JsonlLogger(run.path / FILE_NAME)
    metrics.truncate_after(start_step)
    public = redact(config)
    starts: dict[str, Callable[[], Logger]] = {}
    wandb_disabled = os.environ.get("WANDB_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off")
    if tracking.name != "off" and not wandb_disabled:
        starts["W&B"] = partial(_open_wandb, run.path, stage, public, tracking)
    starts |= {name: partial(AccelerateLogger, name, run.path, public) for name in tracking.loggers}
    loggers = [AsyncLogger(name, start, tracking.finish_timeout) for name, start in starts.items()]
    return LoggerCollection(metrics, loggers, tracking.log_images)


def _open_wandb(folder: Path, stage: str, config: dict[str, Any], tracking: TrackingConfig) -> Logger:
    from ssl_pipeline.logging.wandb import open_wandb  # in the logger's thread: the first step does not wait for it

    return open_wandb(folder, stage, config, tracking)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) != "wandb")
    installed = {str(name) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name not in known:
            problems.append(f"{name!r} is none of {', '.join(known)} (W&B is chosen by `tracking=wandb`).")
        elif name not in installed:
            install = f"-e '.[{name}]' in the project's folder" if name in _EXTRAS else name
            problems.append(f"{name} is not installed: pip install {install}")
    if problems:
        raise ConfigError([f"`tracking.loggers`: {problem}" for problem in problems])
