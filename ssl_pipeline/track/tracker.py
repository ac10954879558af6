"""Who hears of a run: the local log always, mirrors as long as they live."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from pydantic import Field

from ssl_pipeline.config.base import Strict
from ssl_pipeline.track.jsonl import FILE_NAME, JsonlLog
from ssl_pipeline.track.run import Run, redact

_log = logging.getLogger("ssl_pipeline")


class TrackingConfig(Strict):
    """Mirrors of ``metrics.jsonl``.

    Attributes:
        name: ``auto`` and ``wandb``: W&B, online when a key is there and the server answers, offline otherwise.
            ``off``: none.
        project: W&B project.
        entity: W&B user or team.
        group: W&B group of runs.
        tags: W&B tags.
        init_timeout: seconds to wait for the server before going offline.
    """

    name: Literal["auto", "wandb", "off"] = "auto"
    project: str = "ssl_pipeline"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    init_timeout: float = Field(20.0, gt=0)


class Tracker(Protocol):
    """Hears the figures of a run."""

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """The figures after ``step`` steps."""

    def alert(self, title: str, text: str) -> None:
        """Something that a person should hear of."""

    def finish(self) -> None:
        """No more will come."""


class Trackers:
    """The log and its mirrors. A mirror that fails is dropped with one warning, and the run goes on.

    Args:
        truth: the log; None where nothing is to be heard, in all processes but the main one.
        mirrors: repeat what the log holds.
    """

    def __init__(self, truth: JsonlLog | None, mirrors: list[Tracker]) -> None:
        self._truth, self._mirrors = truth, list(mirrors)

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """The figures after ``step`` steps."""
        if self._truth is not None and figures:
            self._truth.log(step, figures)
            self._tell(lambda mirror: mirror.log(step, figures))

    def alert(self, step: int, title: str, text: str) -> None:
        """A sentence that somebody should read at once; mirrors that can wake people do."""
        if self._truth is not None:
            self._truth.log(step, {"alert": f"{title}: {text}"})
            self._tell(lambda mirror: mirror.alert(title, text))

    def finish(self) -> None:
        """Closes the log first: a mirror may wait for its server."""
        if self._truth is not None:
            self._truth.finish()
            self._tell(lambda mirror: mirror.finish())

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for mirror in list(self._mirrors):
            try:
                call(mirror)
            except Exception as error:
                self._mirrors.remove(mirror)
                _log.warning(
                    "%s failed (%s) and is left out; %s holds everything", type(mirror).__name__, error, FILE_NAME
                )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def open_trackers(
    run: Run | None, stage: str, config: dict[str, Any], tracking: TrackingConfig, start_step: int, main: bool = True
) -> Trackers:
    """The trackers of a run.

    Args:
        run: its folder; None in all processes but the main one.
        stage: ``pretrain`` or ``finetune``.
        config: the resolved configuration; mirrors get it without secrets.
        tracking: which mirrors.
        start_step: the last step whose figures stay, −1 for none; what was logged beyond it is dropped, since the run repeats it.
        main: whether this process speaks; silent trackers if not.
    """
    if run is None or not main:
        return Trackers(None, [])
    truth = JsonlLog(run.path / FILE_NAME)
    truth.truncate_after(start_step)
    mirrors: list[Tracker] = []
    if tracking.name != "off":
        from ssl_pipeline.track.wandb import open_wandb  # wandb only where it is wanted

        try:
            mirrors.append(open_wandb(run.path, stage, redact(config), tracking))
        except Exception as error:
            _log.warning("W&B can't be started (%s); %s holds everything", error, FILE_NAME)
    return Trackers(truth, mirrors)
