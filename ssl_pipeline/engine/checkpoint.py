"""A run's resume state: written whole or not at all, checked when it is read, and where a changed run continues from it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply

from ssl_pipeline.config.base import ConfigError, UserError, first_line
from ssl_pipeline.config.files import flush
from ssl_pipeline.data.loader import TrainLoader
from ssl_pipeline.engine.optim import OptimConfig

_NAME, _PARTIAL = "step-", ".partial"
_MARK = b"sha256:"  # a checkpoint ends with this and the digest of all that stands before it
_TRAILER = len(_MARK) + hashlib.sha256().digest_size
_SMALL = 32 * 2**20  # bytes, which are on the disk before anybody has waited
_LEAP = 1.25  # a learning rate that changes by more than this factor from one step to the next is said to leap
_log = logging.getLogger("ssl_pipeline")


class CheckpointError(UserError):
    """A checkpoint can't be written, or none of those left can be read."""


class _DamagedError(Exception):
    """One checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints of a run, in a folder of its own.

    A checkpoint is written with its checksum under a temporary name and flushed to the disk; then it gets its name, the
    folder is flushed too, and only then are older ones removed: at every instant after the first, a complete one exists.

    A large one is written by a thread from a copy, while the run goes on. At most one write is under way; its error is raised
    at the next step, and leaving the ``with`` block waits for it (docs/decisions/0005-checkpoints.md).

    Args:
        folder: where they are kept.
        every: steps between two; None for the end only.
        keep: how many to keep, 1 or more.
        main: whether this process writes. All of them read.
    """

    def __init__(self, folder: Path, every: int | None = None, keep: int = 2, main: bool = True) -> None:
        self.folder, self.every, self.keep, self.main = folder, every, keep, main
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with contextlib.suppress(CheckpointError) if kind is not None else contextlib.nullcontext():
            self.wait()

    def due(self, done: int, total: int) -> bool:
        """Whether one is due after ``done`` steps; asked at every step.

        Raises:
            CheckpointError: the one under way has failed.
        """
        if self._under_way is not None and self._under_way.done():
            self.wait()
        return done == total or (self.every is not None and done % self.every == 0)

    def save(self, done: int, state: dict[str, Any]) -> None:
        """Writes the state after ``done`` steps: tensors, numbers, strings and containers of them.

        Raises:
            CheckpointError: it, or the one before, can't be written.
        """
        if not self.main:
            return
        self.wait()
        whole, sizes = {"done": done, **state}, list[int]()
        recursively_apply(lambda tensor: sizes.append(tensor.nbytes), whole)
        if sum(sizes) <= _SMALL:
            self._write(done, whole)
            return
        # The next step does not change a copy.
        copied = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), whole)
        thread = ThreadPoolExecutor(1)
        self._under_way = thread.submit(self._write, done, copied)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the write under way.

        Raises:
            CheckpointError: it has failed.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def load(self) -> dict[str, Any] | None:
        """The state of the last whole checkpoint, or None if there never was one; removes what a killed write has left.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        if self.main:
            for left in self.folder.glob(f".{_NAME}*{_PARTIAL}"):
                left.unlink()
        found = self._complete()
        for path in reversed(found):
            try:
                return _read(path)
            except _DamagedError as error:
                if self.main:
                    _log.warning("the checkpoint %s is damaged (%s): the one before is taken", path, error)
        if found:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is whole: restore one from a copy, or remove that folder and "
                "start again from the first step."
            )
        return None

    def _write(self, done: int, state: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        final = self.folder / f"{_NAME}{done:09d}.pt"
        temporary = final.with_name(f".{final.name}{_PARTIAL}")
        try:
            _make_folder(self.folder)
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.write(_MARK + hashlib.sha256(content.getbuffer()).digest())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
            flush(self.folder)
            self._remove_others(final)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # a full disk has that much room again
            left = self._complete()
            raise CheckpointError(
                f"the checkpoint of step {done} can't be written into {self.folder} ({error.strerror}): make room, and "
                f"continue by `resume=auto` {f'from {left[-1].name}' if left else 'from the first step'}."
            ) from error

    def _remove_others(self, newest: Path) -> None:
        """Keeps the newest ones; those of later steps are damaged, or of a run that was reset to an earlier step."""
        earlier = [path for path in self._complete() if path < newest]
        later = [path for path in self._complete() if path > newest]
        for path in [*earlier[: max(0, len(earlier) + 1 - self.keep)], *later]:
            path.unlink()

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_NAME}*.pt"))


@contextlib.contextmanager
def must_fit() -> Iterator[None]:
    """Around the loading of a checkpoint's state: ``resume=changed`` can't carry it into another network.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the checkpoint does not fit this configuration ({first_line(error)}). `resume=changed` goes on with other rates, lengths and data, "
            "and not with another network, task or optimizer: undo that change, or choose another `output`."
        ) from error


def check_steps_left(state: Mapping[str, Any], loader: TrainLoader, in_steps: bool) -> None:
    """Refuses a changed configuration that would end without a step, as if it had been trained; changes nothing.

    ``loader`` is the new configuration's, and ``in_steps`` whether its length is given in optimizer steps, rather than in epochs.

    Raises:
        ConfigError: no step is left.
    """
    planned = copy.copy(loader)
    step = planned.resume(state["position"], state["done"], in_steps)
    if step < planned.total_steps:
        return
    epoch = step / planned.steps_per_epoch
    longer = 2 * state["done"] if in_steps else max(math.ceil(2 * epoch), math.floor(epoch) + 1)
    raise ConfigError(
        f"nothing is left to train: {state['done']} steps were taken, up to epoch {epoch:.2f}, and this configuration ends at "
        f"step {planned.total_steps + planned.offset} (epoch {planned.total_steps / planned.steps_per_epoch:.2f}). Train longer, such as by "
        f"{'steps' if in_steps else 'epochs'}={longer}, undo the change, or choose another output=FOLDER."
    )


def describe_resume(state: Mapping[str, Any], loader: TrainLoader, optim: OptimConfig) -> str:
    """Epoch and learning rate before and after a change, of a loader that continues already."""
    progress = loader.clock(state["done"] - loader.offset)
    epoch, ends = progress.step / loader.steps_per_epoch, loader.total_steps / loader.steps_per_epoch
    rate, before = optim.peak_rate(loader.batch_size) * optim.factor(progress), state["rate"]
    leaps = before > 0 and not 1 / _LEAP <= rate / before <= _LEAP
    return (
        f"goes on at epoch {epoch:.2f} of {ends:.2f}, after step {state['done']} of {loader.total_steps + loader.offset}: the learning "
        f"rate {'leaps' if leaps else 'goes'} from {before:.3g} to {rate:.3g}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _DamagedError(error.strerror) from error
    body, trailer = content[:-_TRAILER], content[-_TRAILER:]
    if not trailer.startswith(_MARK):
        raise _DamagedError("it has no checksum at its end")
    if hashlib.sha256(body).digest() != trailer[len(_MARK) :]:
        raise _DamagedError("its checksum is another")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever this version of torch says of what another one wrote
        raise _DamagedError(f"{type(error).__name__} when reading it") from error
    return state


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)
