"""Who hears of a run: the local log always, mirrors as long as they live."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from pydantic import Field

from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.logging.background import AsyncLogger
from ssl_pipeline.logging.by_name import check_names, open_by_name
from ssl_pipeline.logging.jsonl import FILE_NAME, JsonlLogger
from ssl_pipeline.logging.progress import Mode
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import RunFolder

_log = logging.getLogger("ssl_pipeline")


class TrackingConfig(FrozenModel):
    """Who hears of a run, beside ``metrics.jsonl``.

    Attributes:
        name: ``auto`` and ``wandb``: W&B, online when a key is there and the server answers, offline otherwise.
            ``off``: no W&B.
        mirrors: further mirrors, by the names that Accelerate has for its trackers, such as ``tensorboard``.
        pictures: whether views, neighbors and maps are drawn into the run's ``media/``.
        terminal: ``rich``: a bar. ``plain``: lines, for a batch system's log. ``quiet``: nothing but warnings and mistakes.
            ``auto``: a bar in a terminal, lines elsewhere.
        project: W&B project.
        entity: W&B user or team.
        group: W&B group of runs.
        tags: W&B tags.
        init_timeout: seconds that W&B's server may take to answer before W&B goes offline; training goes on meanwhile.
        finish_timeout: seconds that a mirror may take at a run's end to send what is left.
    """

    name: Literal["auto", "wandb", "off"] = "auto"
    mirrors: tuple[str, ...] = ()
    pictures: bool = True
    terminal: Mode = "auto"
    project: str = "ssl_pipeline"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    init_timeout: float = Field(20.0, gt=0)
    finish_timeout: float = Field(120.0, gt=0)


class Logger(Protocol):
    """Hears of a run."""

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """The figures after ``step`` steps."""

    def pictures(self, step: int, files: Mapping[str, Path]) -> None:
        """PNG files of after ``step`` steps, by their names."""

    def alert(self, title: str, text: str) -> None:
        """Something that a person should look at."""

    def made(self, folder: Path) -> None:
        """The encoder that the run made: a folder with ``encoder.safetensors`` and ``card.json``."""

    def used(self, folder: Path) -> None:
        """The encoder that the run started from: likewise."""

    def finish(self, failed: bool) -> None:
        """No more will come; ``failed``: an error, or a person, stopped the run."""


class LoggerCollection:
    """The log and its mirrors. A mirror that fails is dropped with one warning, and the run goes on.

    Args:
        truth: the log; None where nothing is to be heard, in all processes but the main one.
        mirrors: repeat what the log holds.
        draws: whether pictures are made.
    """

    def __init__(self, truth: JsonlLogger | None, mirrors: list[Logger], draws: bool = False) -> None:
        self._truth, self._mirrors = truth, list(mirrors)
        self.draws = draws and truth is not None

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """The figures after ``step`` steps."""
        if self._truth is not None and figures:
            self._truth.log(step, figures)
            self._tell(lambda mirror: mirror.log(step, figures))

    def forget_training_after(self, step: int) -> None:
        """Drops stage two's lines of training beyond a step of theirs, which a continued run repeats."""
        if self._truth is not None:
            self._truth.forget_training_after(step)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Pictures after ``step`` steps: saved as ``media/NAME-STEP.png`` of the run, a line in the log says where."""
        if self._truth is None or not pictures:
            return
        folder = self._truth.path.parent
        (folder / "media").mkdir(exist_ok=True)
        files = {}
        for name, picture in pictures.items():
            files[f"media/{name}"] = folder / "media" / f"{name}-{step:08d}.png"
            picture.save(files[f"media/{name}"], compress_level=1)  # twice as fast as the default, a tenth larger
        self._truth.log(step, {name: file.relative_to(folder).as_posix() for name, file in files.items()})
        self._tell(lambda mirror: mirror.pictures(step, files))

    def alert(self, step: int, title: str, text: str) -> None:
        """A sentence that somebody should read at once: a line in the log, and the mirrors' own ways of waking people."""
        if self._truth is not None:
            self._truth.log(step, {"alert": title, "text": text})
            self._tell(lambda mirror: mirror.alert(title, text))

    def made(self, folder: Path) -> None:
        """The encoder that the run made: a folder with ``encoder.safetensors`` and ``card.json``."""
        self._tell(lambda mirror: mirror.made(folder))

    def used(self, encoder: str | Path) -> None:
        """The encoder that the run started from: a folder or a file in it; an address elsewhere says nothing to a mirror."""
        path = Path(encoder)
        folder = path if path.is_dir() else path.parent
        if (folder / "encoder.safetensors").is_file() and (folder / "card.json").is_file():
            self._tell(lambda mirror: mirror.used(folder))

    def finish(self, failed: bool = False) -> None:
        """Closes the log first: a mirror may wait for its server."""
        if self._truth is not None:
            self._truth.finish()
            self._tell(lambda mirror: mirror.finish(failed))

    def _tell(self, call: Callable[[Logger], None]) -> None:
        for mirror in list(self._mirrors):
            try:
                call(mirror)
            except Exception as error:
                self._mirrors.remove(mirror)
                _log.warning(
                    "%s failed (%s) and is left out; %s holds everything", type(mirror).__name__, error, FILE_NAME
                )

    def __enter__(self) -> LoggerCollection:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(failed=kind is not None)


def open_loggers(
    run: RunFolder | None,
    stage: str,
    config: dict[str, Any],
    tracking: TrackingConfig,
    start_step: int,
    main: bool = True,
) -> LoggerCollection:
    """The trackers of a run.

    Args:
        run: its folder; None in all processes but the main one.
        stage: ``pretrain``, ``finetune`` or ``study``.
        config: the resolved configuration; mirrors get it without secrets.
        tracking: which mirrors.
        start_step: the last step whose figures stay, −1 for none; what was logged beyond it is dropped, since the run repeats it.
        main: whether this process speaks; silent trackers if not.
    """
    if run is None or not main:
        return LoggerCollection(None, [])
    check_names(tracking.mirrors)
    truth = JsonlLogger(run.path / FILE_NAME)
    truth.truncate_after(start_step)
    openers: dict[str, Callable[[], Logger]] = {}
    if tracking.name != "off" and not _switched_off(os.environ.get("WANDB_DISABLED", "")):
        openers["W&B"] = partial(_open_wandb, run.path, stage, redact(config), tracking)
    for name in tracking.mirrors:
        openers[name] = partial(open_by_name, name, run.path, redact(config))
    mirrors: list[Logger] = [AsyncLogger(name, make, tracking.finish_timeout) for name, make in openers.items()]
    return LoggerCollection(truth, mirrors, tracking.pictures)


def _switched_off(disabled: str) -> bool:
    """What ``WANDB_DISABLED`` says."""
    return disabled.strip().lower() not in ("", "0", "false", "no", "off")


def _open_wandb(folder: Path, stage: str, config: dict[str, Any], tracking: TrackingConfig) -> Logger:
    # Imported where it is wanted alone, and in the mirror's thread: the first step does not wait for it.
    from ssl_pipeline.logging.wandb import open_wandb

    return open_wandb(folder, stage, config, tracking)
