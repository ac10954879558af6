"""A run's folder: never shared by two runs, and enough in it to repeat the run."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf

from ssl_pipeline.config.base import ConfigError

_PACKAGES = (
    "ssl-pipeline", "torch", "torchvision", "lightly", "accelerate", "numpy", "pillow", "pydantic", "hydra-core", "wandb",
)  # fmt: skip
_SECRET = re.compile(r"(^|[_\-.])(api_?key|token|secret|password|passwd|credentials?)([_\-.=]|$)", re.IGNORECASE)
_FREE_TO_CHANGE = ("output", "resume", "tracking", "workers", "log_every")


class Run:
    """An open run folder; closing it lets another process in.

    Attributes:
        path: the folder.
        resumed: whether it held the same run before.
    """

    def __init__(self, path: Path, resumed: bool, lock: int) -> None:
        self.path, self.resumed, self._lock = path, resumed, lock

    def close(self) -> None:
        """Gives the folder's lock back."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(
    output: str | None, stage: str, resume: Literal["no", "auto"], config: dict[str, Any], root: Path = Path("runs")
) -> Run:
    """Makes or continues a run's folder, and writes ``config.yaml`` and ``run.json`` into it.

    Args:
        output: the folder; None takes the next free number, ``runs/<stage>-001``.
        stage: for the number's name.
        resume: ``auto`` continues the run in ``output`` if there is one.
        config: the resolved configuration.
        root: where numbered folders are made.

    Raises:
        ConfigError: the folder holds another run, is in use, or can't be written.
    """
    if output is None and resume == "auto":
        raise ConfigError("`resume=auto` needs `output`: the folder of the run to continue.")
    path = Path(output).expanduser() if output is not None else None
    try:
        if path is None:
            path = _next_number(root, stage)
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(entry.name != ".lock" for entry in path.iterdir())
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"`output`: {str(path)!r} can't be written ({error.strerror}): choose another folder.") from error
    run = Run(path, occupied, lock)
    try:
        _take(lock, path)
        if occupied:
            _check_continues(path, resume, config)
        write_text_atomic(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(redact(config))))
        write_text_atomic(path / "run.json", json.dumps(_record(path), indent=1))
    except ConfigError:
        run.close()
        raise
    return run


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Of Python and the packages that shape a result."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def redact(tree: Any) -> Any:
    """The same tree without secrets: the values of keys such as ``api_key``, ``token`` and ``password``."""
    if isinstance(tree, dict):
        return {k: "<redacted>" if _SECRET.search(str(k)) and v is not None else redact(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    return tree


def _next_number(root: Path, stage: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 100_000):
        path = root / f"{stage}-{number:03d}"
        try:
            path.mkdir()  # exclusive: of two runs started at once one gets the next number
        except FileExistsError:
            continue
        return path
    raise ConfigError(f"`output`: {str(root)!r} is full of numbered runs: give `output=FOLDER`.")


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"`output`: {str(path)!r} is in use by another process: wait for it, or choose another folder.") from None


def _check_continues(path: Path, resume: str, config: dict[str, Any]) -> None:
    written = path / "config.yaml"
    if resume != "auto":
        raise ConfigError(f"`output`: {str(path)!r} is not empty: choose another folder, or continue the run in it by `resume=auto`.")
    if not written.is_file():
        raise ConfigError(f"`output`: {str(path)!r} is not empty and holds no run to continue: choose another folder.")
    before = _flat(OmegaConf.to_container(OmegaConf.load(written)))
    now = _flat(OmegaConf.to_container(OmegaConf.create(redact(config))))
    changed = [
        f"`{key}` was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in _FREE_TO_CHANGE
    ]
    if changed:
        raise ConfigError([*changed, f"{str(path)!r} can only be continued as it was started: undo these, or choose another `output`."])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _record(path: Path) -> dict[str, Any]:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    words = ["<redacted>" if _SECRET.search(word) else word for word in sys.argv]
    start = {"started": started, "command": words, "commit": _commit(), "threads": torch.get_num_threads(), "versions": versions()}
    try:
        earlier = json.loads((path / "run.json").read_text())["starts"]
    except (OSError, ValueError, KeyError):
        earlier = []
    return {"starts": [*earlier, start]}


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
