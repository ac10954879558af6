"""The W&B mirror. wandb is imported here and nowhere else, and only when it is wanted."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_pipeline.track.run import write_text_atomic

if TYPE_CHECKING:
    import wandb

    from ssl_pipeline.track.tracker import TrackingConfig

_log = logging.getLogger("ssl_pipeline")
_SECONDS_TO_FINISH = 120.0


class WandbMirror:
    """One W&B run; figures keep our own step, since W&B drops steps that go back."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """The figures after ``step`` steps."""
        self._run.log({**figures, "step": step})

    def alert(self, title: str, text: str) -> None:
        """W&B sends it to whom the user has told it to."""
        self._run.alert(title=title, text=text, level="WARN")

    def finish(self) -> None:
        """Waits for what is under way, but not for ever."""
        self._run.finish()


def open_wandb(folder: Path, stage: str, config: dict[str, Any], tracking: TrackingConfig) -> WandbMirror:
    """Starts or continues the W&B run of a run's folder.

    W&B's own ``mode`` (``WANDB_MODE``, ``wandb offline``) is obeyed. Otherwise: online when W&B finds a key and its server
    answers in time, offline when not. Where a key comes from and which server it is for is W&B's affair alone: neither
    is read from our configuration.

    Args:
        folder: the run's; W&B writes into its ``wandb/``.
        stage: W&B's job type.
        config: what W&B shall keep of the configuration, without secrets.
        tracking: project, entity, group, tags, and how long to wait.
    """
    arguments = {
        "id": _identity(folder), "resume": "allow", "dir": folder, "name": folder.name, "job_type": stage,
        "project": tracking.project, "entity": tracking.entity, "group": tracking.group, "tags": list(tracking.tags),
        "config": config,
    }  # fmt: skip
    try:
        return _start(arguments, _mode(tracking), tracking)
    except Exception as error:
        _forget_failed_start()
        mirror = _start(arguments, "offline", tracking)
        _log.warning("W&B can't go online (%s): it logs offline, send that later by `wandb sync`", _first_line(error))
        return mirror


def _identity(folder: Path) -> str:
    """One identity a folder, so that a continued run is the same W&B run."""
    file = folder / "wandb_id"
    if not file.exists():
        write_text_atomic(file, uuid.uuid4().hex[:12])
    return file.read_text(encoding="utf-8").strip()


def _mode(tracking: TrackingConfig) -> str:
    import wandb

    chosen = os.environ.get("WANDB_MODE") or wandb.setup(_settings(tracking)).settings.mode
    if chosen != "online":
        return str(chosen)
    if wandb.login(prompt=False, verify=False):  # finds a key in all places that W&B knows, and asks nobody
        return "online"
    if os.environ.get("WANDB_MODE"):
        _log.warning("WANDB_MODE is online, but W&B finds no key (see `wandb login`): it logs offline")
    return "offline"


def _start(arguments: dict[str, Any], mode: str, tracking: TrackingConfig) -> WandbMirror:
    import wandb

    return WandbMirror(wandb.init(**arguments, mode=mode, reinit="create_new", settings=_settings(tracking)))  # type: ignore[arg-type]


def _settings(tracking: TrackingConfig) -> wandb.Settings:
    """Quiet, and nothing sent but figures, configuration and the load of the machine: no code, command or host name."""
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": tracking.init_timeout, "finish_timeout": _SECONDS_TO_FINISH, "silent": True, "quiet": True,
        "console": "off", "disable_code": True, "save_code": False, "disable_git": True, "disable_job_creation": True,
        "x_disable_meta": True, "host": "",
    }  # fmt: skip
    # Settings come and go between versions of W&B, and an unknown one is an error.
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


def _forget_failed_start() -> None:
    """Ends W&B's service, which holds a failed start's identity as in use; not if another run of this process needs it."""
    import wandb

    if wandb.run is None:
        wandb.teardown()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
