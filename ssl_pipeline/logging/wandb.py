"""The W&B logger. Only this module imports wandb, and only when it is used."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_pipeline.config.base import first_line
from ssl_pipeline.config.files import atomic_write_text
from ssl_pipeline.logging.jsonl import GROUPS, TRAINING_STEP
from ssl_pipeline.logging.logger import Logger, TrackingConfig

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger("ssl_pipeline")
_IDENTITY = "wandb_id"
_TAKEN: set[str] = set()  # identities of this process's runs: WANDB_RUN_ID is one run's


class WandbLogger(Logger):
    """One W&B run.

    Metrics carry our own step, since W&B drops steps that go back: those of ``pretrain`` by step; of ``finetune`` by seed, and in its
    loops by ``finetune/step``; of ``study`` by the number of labeled images. ``identity`` is the run folder's.
    """

    def __init__(self, run: wandb.Run, stage: str, identity: str) -> None:
        self._run, self._identity = run, identity
        self._axis = {"finetune": "seed", "study": "labels"}.get(stage, "step")
        for axis in (self._axis, TRAINING_STEP):
            run.define_metric(axis)
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric=TRAINING_STEP if group == "finetune" else self._axis)

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._run.log({**metrics, self._axis: step})

    def log_images(self, step: int, files: Mapping[str, Path]) -> None:
        """One image a name: far from the 50 a step and 108 a list beyond which W&B drops some."""
        import wandb

        self._run.log({name: wandb.Image(str(file)) for name, file in files.items()} | {self._axis: step})

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title[:63], text)  # W&B's titles have less than 64 characters

    def log_model(self, folder: Path) -> None:
        self._run.log_artifact(_artifact(folder, self._identity))

    def use_model(self, folder: Path) -> None:
        """Links the run to the artifact of the stage-one run that made the encoder.

        W&B knows an artifact by its name and contents: the same files under the same name are the same version. Offline,
        `use_artifact` raises, since it would ask the server; but `wandb sync` sends the record of a new artifact, so that is written.
        """
        name = _made_by(folder)
        if name is None:
            return
        self._run.config.update({"stage_one": {"wandb_id": name, "artifact": f"encoder-{name}"}})  # type: ignore[no-untyped-call]
        artifact = _artifact(folder, name)
        try:
            if self._run.settings._offline:
                self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
            else:
                self._run.use_artifact(artifact)
        except Exception as error:  # another version of W&B may have no such record; the metrics are worth more
            _log.warning("W&B can't link this run to its encoder's (%s)", first_line(error))

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _artifact(folder: Path, identity: str) -> wandb.Artifact:
    import wandb

    artifact = wandb.Artifact(f"encoder-{identity}", type="encoder")
    for name in ("encoder.safetensors", "card.json"):
        # Copied to W&B's cache: the run's files may be overwritten or moved before they are sent.
        artifact.add_file(str(folder / name), name=name)
    return artifact


def _made_by(folder: Path) -> str | None:
    """The identity of the run that wrote an encoder into its folder, or one below it; None for a run without W&B."""
    found = [place / _IDENTITY for place in (folder, folder.parent) if (place / _IDENTITY).is_file()]
    return found[0].read_text(encoding="utf-8").strip() if found else None


def open_wandb(folder: Path, stage: str, config: dict[str, Any], tracking: TrackingConfig) -> WandbLogger:
    """Starts or continues the W&B run of a run's folder.

    W&B's own ``mode`` (``WANDB_MODE``, ``wandb offline``) holds. Otherwise it is online when W&B finds a key and its server
    answers in time, and offline when not. The key and the server are found by W&B alone, never in our configuration. Names and
    groups that the configuration leaves at their defaults come from W&B's environment variables.
    """
    tags = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    default = type(tracking).model_fields["project"].default
    arguments = {
        "id": _identity(folder), "resume": "allow", "dir": folder, "name": os.environ.get("WANDB_NAME") or folder.name,
        "job_type": os.environ.get("WANDB_JOB_TYPE") or stage, "notes": os.environ.get("WANDB_NOTES"),
        "project": (os.environ.get("WANDB_PROJECT") if tracking.project == default else None) or tracking.project,
        "entity": tracking.entity or os.environ.get("WANDB_ENTITY"),
        "group": tracking.group or os.environ.get("WANDB_RUN_GROUP"), "tags": list(tracking.tags) or tags, "config": config,
    }  # fmt: skip
    try:
        return _start(folder, stage, arguments, _mode(tracking), tracking)
    except Exception as error:
        _forget_failed_start()
        logger = _start(folder, stage, arguments, "offline", tracking)
        _log.warning("W&B can't go online (%s): it logs offline, send that later by `wandb sync`", first_line(error))
        return logger


def _identity(folder: Path) -> str:
    """One identity a folder, so that a continued run is the same W&B run; ``WANDB_RUN_ID`` gives it to the first new folder."""
    file = folder / _IDENTITY
    if file.exists():
        return file.read_text(encoding="utf-8").strip()
    wanted = os.environ.get("WANDB_RUN_ID", "").strip()
    identity = wanted if wanted and wanted not in _TAKEN else uuid.uuid4().hex[:12]
    _TAKEN.add(identity)
    atomic_write_text(file, identity)
    return identity


def _mode(tracking: TrackingConfig) -> str:
    import wandb

    chosen = os.environ.get("WANDB_MODE") or wandb.setup(_settings(tracking)).settings.mode
    if chosen != "online":
        return str(chosen)
    if wandb.login(prompt=False, verify=False):  # finds a key wherever W&B looks for one, without a prompt
        return "online"
    if os.environ.get("WANDB_MODE"):
        _log.warning("WANDB_MODE is online, but W&B finds no key (see `wandb login`): it logs offline")
    return "offline"


def _start(
    folder: Path, stage: str, arguments: dict[str, Any], mode: str, tracking: TrackingConfig
) -> WandbLogger:  # fmt: skip
    import wandb

    run = wandb.init(**arguments, mode=mode, reinit="create_new", settings=_settings(tracking))  # type: ignore[arg-type]
    # The agent of a sweep chooses its runs' identities itself: what it chose is what is continued.
    if mode != "disabled" and run.id != arguments["id"]:
        atomic_write_text(folder / _IDENTITY, run.id)
    return WandbLogger(run, stage, run.id if mode != "disabled" else arguments["id"])


def _settings(tracking: TrackingConfig) -> wandb.Settings:
    """Quiet; sends metrics, configuration and the machine's load, but no code, command or host name."""
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": tracking.init_timeout, "finish_timeout": tracking.finish_timeout, "silent": True, "quiet": True,
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
