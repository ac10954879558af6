"""A save dies at each of its file operations in turn, and the disk fills up: a complete checkpoint is always there."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_pipeline.engine import checkpoint
from ssl_pipeline.engine.checkpoint import CheckpointError, Checkpoints
from ssl_pipeline.finetune import finetune
from ssl_pipeline.logging.lock import is_held
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from tests.integration.test_study import artifact
from tests.runs import TINY, ssl_pipeline, tiny_finetune, tiny_pretrain
from tests.unit.test_loader import photos

STATE = {
    "task": {"weight": torch.arange(400.0)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
    "scaler": None,
}
KILLED = 77


def state(done: int) -> dict[str, Any]:
    return {**STATE, "task": {"weight": torch.arange(400.0) + done}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_whole(folder: Path, *allowed: int) -> None:
    """One of the allowed steps is loaded, with what was saved at it."""
    loaded = Checkpoints(folder).load()
    assert loaded is not None
    assert loaded["done"] in allowed
    assert torch.equal(loaded["task"]["weight"], torch.arange(400.0) + loaded["done"])
    assert not [name for name in names(folder) if name.endswith(".partial")]


class Operations:
    """Counts file operations, and lets something happen in place of the n-th."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None] | None = None, at: int = -1
    ) -> None:
        self.trace: list[str] = []
        self._happens, self._at = happens, at
        for name in ("mkdir", "replace", "unlink", "fsync"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        opened = io.open

        def watched_open(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if "w" not in mode:
                return opened(path, mode, *more, **named)
            self.happens("open")
            return _WatchedFile(opened(path, mode, *more, **named), self)

        monkeypatch.setattr(io, "open", watched_open)

    def happens(self, name: str) -> None:
        self.trace.append(name)
        if len(self.trace) - 1 == self._at and self._happens is not None:
            self._happens()

    def _watched(self, name: str, real: Any) -> Any:
        def operation(*values: Any, **named: Any) -> Any:
            self.happens(name)
            return real(*values, **named)

        return operation


class _WatchedFile:
    """A file of which half of a block is written before the operation happens, as a kernel may do."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self._file, self._operations = file, operations

    def write(self, block: Any) -> None:
        half = len(block) // 2
        self._file.write(block[:half])
        self._file.flush()
        self._operations.happens("write")
        self._file.write(block[half:])

    def flush(self) -> None:
        self._operations.happens("flush")
        self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())

    def __enter__(self) -> _WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


EXPECTED = ["mkdir", "open", "write", "write", "flush", "fsync", "replace", "fsync", "unlink"]


def test_a_save_flushes_before_it_renames_and_removes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for done in (1, 2):
        checkpoints.save(done, state(done))
    with monkeypatch.context() as patched:
        operations = Operations(patched)
        checkpoints.save(3, state(3))
    assert operations.trace == EXPECTED
    assert names(checkpoints.folder) == ["step-000000002.pt", "step-000000003.pt"]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("at", range(len(EXPECTED)), ids=[f"{n}-{name}" for n, name in enumerate(EXPECTED)])
def test_killed_at_any_file_operation_of_a_save(at: int, keep: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=keep)
    for done in (1, 2):
        checkpoints.save(done, state(done))
    child = os.fork()
    if child == 0:
        patched = pytest.MonkeyPatch()
        Operations(patched, lambda: os._exit(KILLED), at)
        checkpoints.save(3, state(3))
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == KILLED
    check_whole(folder, *((2,) if at <= EXPECTED.index("replace") else (3,)))
    Checkpoints(folder, keep=keep).save(3, state(3))  # and the run goes on from there
    check_whole(folder, 3)
    assert len(names(folder)) == keep


@pytest.mark.parametrize("at", range(1, len(EXPECTED)), ids=EXPECTED[1:])  # of mkdir only what it leaves matters
def test_any_file_operation_fails(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for done in (1, 2):
        checkpoints.save(done, state(done))

    def fails() -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        Operations(patched, fails, at)
        with pytest.raises(CheckpointError, match=r"step 3 can't be written .*Input/output error.*from step-00000000"):
            checkpoints.save(3, state(3))
    check_whole(folder, *((2,) if at <= EXPECTED.index("replace") else (3,)))


@pytest.mark.parametrize("size", range(0, 3000, 97))
def test_killed_by_the_kernel_in_the_middle_of_a_block(size: int, tmp_path: Path) -> None:
    """SIGXFSZ kills at the very byte that is one too many."""
    folder = tmp_path / "checkpoints"
    Checkpoints(folder).save(1, state(1))
    assert size < (folder / "step-000000001.pt").stat().st_size
    child = os.fork()
    if child == 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        Checkpoints(folder).save(2, state(2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert len(names(folder)) == 2
    check_whole(folder, 1)


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for done in (1, 2, 3):
        checkpoints.save(done, state(done))
    last = checkpoints.folder / "step-000000003.pt"
    content = bytearray(last.read_bytes())
    if harm == "bit":
        content[len(content) // 2] ^= 1
    harmed: dict[str, bytes] = {
        "cut": bytes(content[:-9]),
        "bit": bytes(content),
        "empty": b"",
        "foreign": b"PK" + bytes(900),
    }
    last.write_bytes(harmed[harm])
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["done"] == 2
    assert "step-000000003.pt is damaged" in caplog.text
    # The damaged one never counts among those that are kept.
    Checkpoints(checkpoints.folder, keep=1).save(2, state(2))
    assert names(checkpoints.folder) == ["step-000000002.pt"]
    (checkpoints.folder / "step-000000002.pt").write_bytes(b"rot")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is whole"):
        checkpoints.load()


def test_what_runs_code_when_it_is_read_is_damaged(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "canary",))

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"task": Canary()})
    with pytest.raises(CheckpointError):
        checkpoints.load()
    assert not (tmp_path / "canary").exists()


def test_a_large_state_is_written_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SMALL", 0)
    moving = {"task": {"weight": torch.zeros(5)}}
    with Checkpoints(tmp_path / "checkpoints", every=1) as checkpoints:
        checkpoints.save(1, moving)
        moving["task"]["weight"] += 7  # the next step, while the write is under way
        checkpoints.save(2, moving)
    for done, value in ((2, 7.0), (1, 0.0)):
        loaded = checkpoints.load()
        assert loaded is not None
        assert loaded["done"] == done
        assert loaded["task"]["weight"].tolist() == [value] * 5
        (checkpoints.folder / f"step-{done:09d}.pt").unlink()


def test_a_failed_write_beside_the_run_is_raised_at_a_step_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SMALL", 0)
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1)
    checkpoints.save(1, STATE)
    assert checkpoints._under_way is not None
    assert checkpoints._under_way.exception(timeout=30) is not None
    with pytest.raises(CheckpointError, match="step 1 can't be written"):
        checkpoints.due(2, 9)
    with pytest.raises(CheckpointError, match="step 2 can't be written"), checkpoints:
        checkpoints.save(2, STATE)
    checkpoints.save(3, STATE)
    with pytest.raises(KeyError), checkpoints:  # never in the place of what ended the run
        raise KeyError


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["pretrain", *TINY, "steps=3", "save_every=1 steps", f"output={run}"]
    tight = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({2**15}, {2**15})); "
    done = ssl_pipeline(*words, before=tight)
    assert done.returncode == 2, done.stderr
    assert "the checkpoint of step 1 can't be written" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(run / "checkpoints") == []
    pretrain(tiny_pretrain(run, "steps=3", "save_every=1 steps", "resume=auto"))
    check = Checkpoints(run / "checkpoints").load()
    assert check is not None
    assert check["done"] == 3


def test_an_error_that_a_notebook_keeps_keeps_neither_folder_nor_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the last exception, and with it all frames that it went through."""
    photos(tmp_path / "photos", 8, 24, 16)
    data = ["data=folder", f"data.path={tmp_path / 'photos'}", "batch_size=4", "num_workers=1", "~data.val", "steps=2"]
    encoder = artifact(tmp_path / "enc", 0)
    run, words = tmp_path / "run", [*data, "resume=auto"]
    kept: list[pytest.ExceptionInfo[Exception]] = []
    with monkeypatch.context() as patched:
        patched.setattr(SimCLR, "after_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            pretrain(tiny_pretrain(run, *data))
        kept.append(error)
    assert not multiprocessing.active_children()
    pretrain(tiny_pretrain(run, *words))
    saved = {file: file.read_bytes() for file in (run / "checkpoints").glob("step-*.pt")}
    for file in saved:
        file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as damaged:
        pretrain(tiny_pretrain(run, *words))
    kept.append(damaged)
    for file, content in saved.items():
        file.write_bytes(content)
    pretrain(tiny_pretrain(run, *words))
    with monkeypatch.context() as patched:
        patched.setattr("ssl_pipeline.finetune.finished_seeds", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            finetune(tiny_finetune(encoder, tmp_path / "two", "regime=frozen"))
    assert not is_held(tmp_path / "two")
    assert len(kept) == 2
