"""The W&B mirror. wandb is imported here and nowhere else, and only when it is wanted."""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from ssl_pipeline.track.run import write_text_atomic

if TYPE_CHECKING:
    import wandb

    from ssl_pipeline.track.tracker import TrackingConfig


class WandbMirror:
    """One W&B run; figures keep our own step, since W&B drops steps that go back."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after ``step`` steps."""
        self._run.log({"step": step, **figures})

    def finish(self) -> None:
        """Waits for what is under way."""
        self._run.finish()


def open_wandb(folder: Path, stage: str, config: dict[str, Any], tracking: TrackingConfig) -> WandbMirror:
    """Starts or continues the W&B run of a run's folder.

    The environment's ``WANDB_MODE`` is obeyed. Otherwise: online when W&B finds a key and its server answers in time,
    offline when not. A key is never read from a configuration.
    """
    identity = folder / "wandb_id"
    if not identity.exists():
        write_text_atomic(identity, uuid.uuid4().hex[:12])
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    try:
        return WandbMirror(_init(folder, stage, config, tracking, identity.read_text(), mode))
    except Exception as error:
        if mode != "online":
            raise
        logging.getLogger("ssl_pipeline").warning("W&B does not answer (%s): logging offline into the run folder", error)
        return WandbMirror(_init(folder, stage, config, tracking, identity.read_text(), "offline"))


def _init(
    folder: Path,
    stage: str,
    config: dict[str, Any],
    tracking: TrackingConfig,
    identity: str,
    mode: Literal["online", "offline", "disabled"],
) -> wandb.Run:
    import wandb

    settings = wandb.Settings(
        init_timeout=tracking.init_timeout, silent=True, console="off", disable_git=True, disable_code=True,
        disable_job_creation=True, x_disable_meta=True,
    )  # fmt: skip
    return wandb.init(
        id=identity, resume="allow", mode=mode, dir=folder, project=tracking.project, entity=tracking.entity,
        group=tracking.group, tags=list(tracking.tags), job_type=stage, name=folder.name, config=config, settings=settings,
    )  # fmt: skip


def _has_key() -> bool:
    """Whether W&B would find a key: in the environment, or where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlparse(wandb.setup().settings.base_url).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
