"""Who hears of a run: the local log always, mirrors as long as they live."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from pydantic import Field

from ssl_pipeline.config.base import Strict
from ssl_pipeline.track.jsonl import JsonlLog
from ssl_pipeline.track.run import Run, redact

_log = logging.getLogger("ssl_pipeline")


class TrackingConfig(Strict):
    """Mirrors of ``metrics.jsonl``.

    Attributes:
        name: ``wandb``: W&B, online when a key is there and the server answers, offline otherwise. ``off``: none.
        project: W&B project.
        entity: W&B user or team.
        group: W&B group of runs.
        tags: W&B tags.
        init_timeout: seconds to wait for the server before going offline.
    """

    name: Literal["wandb", "off"] = "wandb"
    project: str = "ssl_pipeline"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    init_timeout: float = Field(20.0, gt=0)


class Tracker(Protocol):
    """A mirror."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after ``step`` steps."""

    def finish(self) -> None:
        """No more will come."""


class Trackers:
    """The log and its mirrors. A mirror that fails is dropped with one warning, and the run goes on."""

    def __init__(self, log: JsonlLog | None, mirrors: list[Tracker]) -> None:
        self._truth, self._mirrors = log, mirrors

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after ``step`` steps."""
        if self._truth is not None and figures:
            self._truth.log(step, figures)
            self._tell(lambda mirror: mirror.log(step, figures))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for mirror in list(self._mirrors):
            try:
                call(mirror)
            except Exception as error:
                self._mirrors.remove(mirror)
                _log.warning("%s failed (%s) and is left out; metrics.jsonl holds everything", type(mirror).__name__, error)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(lambda mirror: mirror.finish())
        if self._truth is not None:
            self._truth.finish()


def open_trackers(
    run: Run | None, stage: str, config: dict[str, Any], tracking: TrackingConfig, start_step: int
) -> Trackers:
    """The trackers of a run; silent ones where ``run`` is None (all processes but the main one)."""
    if run is None:
        return Trackers(None, [])
    mirrors: list[Tracker] = []
    if tracking.name == "wandb":
        from ssl_pipeline.track.wandb import open_wandb

        try:
            mirrors.append(open_wandb(run.path, stage, redact(config), tracking))
        except Exception as error:
            _log.warning("W&B can't be started (%s); metrics.jsonl holds everything", error)
    return Trackers(JsonlLog(run.path, start_step), mirrors)
