"""A run's folder: never shared by two runs, and with all that is needed to repeat the run."""

from __future__ import annotations

import datetime
import json
import logging
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState, is_initialized

from ssl_pipeline.config.base import ConfigError, StoppedByHand, flatten
from ssl_pipeline.config.command import command_words
from ssl_pipeline.config.compose import as_yaml, read_yaml
from ssl_pipeline.config.files import atomic_write_text
from ssl_pipeline.logging.lock import FolderLock
from ssl_pipeline.logging.redaction import redact, redact_command

_log = logging.getLogger("ssl_pipeline")
_PACKAGES = (
    "ssl-pipeline", "torch", "torchvision", "lightly", "accelerate", "numpy", "pillow", "pydantic", "hydra-core", "wandb",
)  # fmt: skip
_FREE_TO_CHANGE = (
    "output", "resume", "tracking", "num_workers", "jobs", "log_every", "save_total_limit",  # none of them moves a figure
    "seeds", "splits", "targets", "methods", "rows", "negative_controls",  # more of them are more figures; a study's cells know their own settings
)  # fmt: skip

Resume = Literal["no", "auto", "changed"]


class RunFolder:
    """An open run folder, locked until it is closed.

    Attributes:
        path: the folder.
        resumed: whether it held the same run before.
        changes: what differs from the run that it held, a sentence each; it was continued despite them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.resumed, self.changes = path, False, list[str]()
        try:
            self._lock = FolderLock(path)
        except BlockingIOError:
            raise ConfigError(
                f"`output`: {str(path)!r} is in use by another process: wait for it, or choose another folder."
            ) from None

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.close()
        if isinstance(error, KeyboardInterrupt):  # of runs within one another it is the outermost that is continued
            what = (error.what, error.together) if isinstance(error, StoppedByHand) else ("stopped by Ctrl-C", False)
            raise StoppedByHand(what[0], self.path, what[1]) from None


def open_run(
    output: str | None,
    stage: str,
    resume: Resume,
    config: dict[str, Any],
    root: Path = Path("runs"),
    data: Mapping[str, str] | None = None,
    check_change: Callable[[Path], None] | None = None,
) -> RunFolder:
    """Makes or continues a run's folder, and writes ``config.yaml`` and ``run.json`` into it.

    ``output`` None takes the next free number, ``runs/<stage>-001``. With ``resume=auto`` a run in ``output`` is continued;
    ``changed`` does so despite another configuration or other ``data`` (fingerprints by name), and keeps note of it in ``run.json``.
    Before anything of such a change is written, ``check_change`` is given the folder, and raises a ConfigError where the changes
    leave nothing to do.

    Raises:
        ConfigError: the folder holds another run, is in use, or can't be written.
    """
    if output is None and resume != "no":
        raise ConfigError(f"`resume={resume}`: which run? Give its folder by `output=FOLDER`.")
    path = Path(output).expanduser() if output is not None else None
    try:
        if path is None:
            path = _next_number(root, stage)
        else:
            path.mkdir(parents=True, exist_ok=True)
            if _occupied(path) and not (path / "config.yaml").exists():
                # Refused before the lock, so that no file is left in a folder that is not ours.
                raise ConfigError(f"`output`: {str(path)!r} is not empty and holds no run: choose another folder.")
        run = RunFolder(path)
        try:
            _settle(run, resume, config, dict(data or {}), check_change)
        except BaseException:  # which a notebook keeps: the folder must be free again
            run.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"`output`: {str(path or root)!r} can't be written ({error.strerror}): choose a folder that can."
        ) from error
    return run


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON that every reader takes: a number that is not finite becomes the text ``nan``, ``inf`` or ``-inf``."""
    atomic_write_text(path, json.dumps(without_nan(tree), indent=1, ensure_ascii=False, allow_nan=False))


def without_nan(tree: Any) -> Any:
    """The same tree with ``nan``, ``inf`` and ``-inf`` as texts: JSON has no such numbers."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    if isinstance(tree, Mapping):
        return {key: without_nan(value) for key, value in tree.items()}
    return [without_nan(value) for value in tree] if isinstance(tree, list | tuple) else tree


def versions() -> dict[str, str]:
    """Of Python and the packages that shape a result."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _next_number(root: Path, stage: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    taken = [entry.name.removeprefix(f"{stage}-") for entry in root.glob(f"{stage}-*")]
    number = max((int(name) for name in taken if name.isdecimal()), default=0)
    while True:
        number += 1
        path = root / f"{stage}-{number:03d}"
        try:
            path.mkdir()  # exclusive: of two runs started at once one gets the next number
        except FileExistsError:
            continue
        return path


def _occupied(path: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before its first file was whole."""
    return any(
        entry.name != ".lock" and not (entry.name.startswith(".") and entry.name.endswith(".partial"))
        for entry in path.iterdir()
    )


def _settle(
    run: RunFolder,
    resume: Resume,
    config: dict[str, Any],
    data: dict[str, str],
    check_change: Callable[[Path], None] | None,
) -> None:
    """Looks what is there, and writes what the run is."""
    run.resumed = _occupied(run.path)
    start, earlier = _start(data), earlier_starts(run.path)
    if run.resumed:
        if resume == "no":
            raise ConfigError(
                f"`output`: {str(run.path)!r} holds a run: choose another `output=FOLDER`, or continue it by `resume=auto`."
            )
        before = earlier[-1] if earlier else {}
        changes = _changed_config(run.path, config) + _changed_data(before.get("data", {}), data)
        if changes and resume != "changed":
            raise ConfigError([
                *changes,
                f"{str(run.path)!r} is continued as it was started: undo these, choose another `output=FOLDER`, or go on "
                "despite them by `resume=changed`, of which run.json keeps note.",
            ])  # fmt: skip
        if changes and check_change is not None:
            check_change(run.path)
        run.changes = start["changed"] = changes
        for note in [*changes, *_changed_surroundings(before, start)]:
            _log.warning("%s", note)
    files = {
        "config.yaml": as_yaml(redact(config)),
        "run.json": json.dumps({"starts": [*earlier, start]}, indent=1),
    }
    # Killed between the two, a new run is one that can be continued, and a change is noted before it is forgotten.
    for name in reversed(files) if run.resumed else files:
        atomic_write_text(run.path / name, files[name])


def _changed_config(path: Path, config: dict[str, Any]) -> list[str]:
    try:
        before = flatten(read_yaml(path / "config.yaml"))
    except Exception as error:  # missing, no YAML, or no text at all: whatever the parsers raise
        raise ConfigError(
            f"`output`: {str(path)!r} can't be continued, its config.yaml can't be read ({error}): choose another folder."
        ) from error
    now = flatten(redact(config))
    return [
        f"`{key}` was {before.get(key, 'not there')!r} and is now {now.get(key, 'not there')!r}."
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ...) != now.get(key, ...) and key.split(".")[0] not in _FREE_TO_CHANGE
    ]


def _changed_data(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"`{name}` is not what the run was started on: its images, labels or weights have changed since."
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def _changed_surroundings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changes the last bits of a figure, and no more: it is said, and the run goes on."""
    current = {"threads": now["threads"], "commit": now["commit"], **now["versions"]}
    earlier = {**before, **before.get("versions", {})}
    return [
        f"{name} was {earlier[name]} and is now {value}: from here on the last bits may differ from those of a run that was not "
        "stopped."
        for name, value in current.items()
        if earlier.get(name) is not None and earlier[name] != value
    ]


def _start(data: dict[str, str]) -> dict[str, Any]:
    """A start of the run. The host's name is left out: a run folder is made to be given away."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(redact_command(command_words())),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "device": _device(),
        "versions": versions(),
        "data": data,
    }


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """What ``run.json`` has noted of each start of a run; empty where it can't be read."""
    try:
        starts: list[dict[str, Any]] = json.loads((path / "run.json").read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        return []
    return starts


def _device() -> str | None:
    """What the run computes on, such as ``2 × NVIDIA H100``; None where no accelerator was started."""
    if not is_initialized():
        return None
    state = AcceleratorState()
    name = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else str(state.device)
    return name if state.num_processes == 1 else f"{state.num_processes} × {name}"


def _commit() -> str | None:
    """The commit of the source tree that runs, None for an installed package or where git is absent."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
