"""A process or worker that is killed or hangs: the others leave in time, and say what happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import cast

import pytest
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.timeout import Patience, timeout_seconds
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.engine.failures import LostProcessError, explain, waits_in_torch
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from tests.fault.launched import launched
from tests.ranks import TWO, ranks
from tests.runs import TINY, forked, same_bytes, tiny_pretrain
from tests.unit.test_loader import photos


def test_a_killed_process_is_missed_by_the_others(tmp_path: Path) -> None:
    run = launched(tmp_path / "run", interpreters=True, SSL_PIPELINE_TIMEOUT="15")
    run.wait_for_steps(3)
    run.ranks()[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code, log = run.leave(60)
    assert code == 71, log
    assert time.monotonic() - began < 30
    assert "process 0:" in log
    # Now and then (once in thirty times, seen) gloo does not hear that the connection is gone, and its time-out tells it.
    assert "process(es) 1 was killed" in log or "process(es) 1 has not answered" in log


def test_a_process_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    run = launched(tmp_path / "run", "save_every=1 steps", SSL_PIPELINE_TIMEOUT="8")
    run.wait_for_steps(3)
    run.ranks()[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code, log = run.leave(60)
    assert code == 71, log
    assert 7 < time.monotonic() - began < 40
    assert "process(es) 1 has not answered within 8 s" in log
    resumed = tiny_pretrain(tmp_path / "run", "steps=100000", "save_every=1 steps", "resume=auto")
    assert resumed.resume == "auto"
    assert list((run.folder / "checkpoints").glob("step-*.pt"))


def test_a_group_that_was_stopped_as_one_goes_on(tmp_path: Path) -> None:
    run = launched(tmp_path / "run", SSL_PIPELINE_TIMEOUT="6")
    run.wait_for_steps(3)
    ranks = run.ranks()
    for process in ranks:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)  # the others wait for it now
    done = len(read_metrics(run.folder))
    time.sleep(8)
    for process in reversed(ranks):
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
    run.wait_for_steps(done + 5)
    run.launch.send_signal(signal.SIGTERM)
    code, log = run.leave(60)
    assert code == 75, log


@pytest.mark.slow
def test_an_exception_in_one_process_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    done = forked(*TWO, "tests/fault/one_share.py", *TINY, "steps=1000", f"output={tmp_path / 'run'}", FAULT="raise")
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    assert "KeyError: 'a mistake of process 1'" in done.stderr
    assert "process(es) 1 was killed, or left by a mistake of its own" in done.stderr


def with_worker(tmp_path: Path, steps: int = 2000, name: str = "run") -> Path:
    """A run with a worker that decodes files."""
    photos(tmp_path / "photos", 16, 24, 16)
    data = ["data=folder", f"data.path={tmp_path / 'photos'}", "batch_size=4", "num_workers=1", "~data.val"]
    return pretrain(tiny_pretrain(tmp_path / name, *data, f"steps={steps}", "log_every=1000"))


def test_a_killed_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = SimCLR.embed

    def kills(self: SimCLR, batch: Batch) -> dict[str, Tensor]:
        if batch.clock.step == 1:
            for process in multiprocessing.active_children():
                process.kill()
        return embed(self, batch)

    monkeypatch.setattr(SimCLR, "embed", kills)
    with pytest.raises(LostProcessError, match=r"a worker that decodes files was killed .*in step"):
        with_worker(tmp_path)


def test_a_worker_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens, opened = FileDataset.open_reduced, []

    def hangs(self: FileDataset, index: int, factor: int) -> Image.Image:
        if get_worker_info() is not None:
            opened.append(index)
        if len(opened) > 30:
            time.sleep(1000)  # a file server that has gone
        return opens(self, index, factor)

    monkeypatch.setattr(FileDataset, "open_reduced", hangs)
    monkeypatch.setenv("SSL_PIPELINE_TIMEOUT", "4")
    began = time.monotonic()
    with pytest.raises(LostProcessError, match="has given nothing for 2 s") as lost:
        with_worker(tmp_path)
    assert lost.value.exit_code == 71
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_a_worker_that_is_stopped_is_not_waited_for(
    pause: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches announced whose memory it has not handed over, which the loader's own time-out would never see."""
    embed = SimCLR.embed

    def stops(self: SimCLR, batch: Batch) -> dict[str, Tensor]:
        if batch.clock.step == 3:
            time.sleep(pause)
            for process in multiprocessing.active_children():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGSTOP)
        return embed(self, batch)

    monkeypatch.setattr(SimCLR, "embed", stops)
    monkeypatch.setenv("SSL_PIPELINE_TIMEOUT", "4")
    began = time.monotonic()
    with pytest.raises(LostProcessError, match=r"has given nothing for 2 s .* in step \d") as lost:
        with_worker(tmp_path)
    assert lost.value.exit_code == 71
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


def test_a_worker_that_is_stopped_with_the_first_batch_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is announced, and its memory is still to be fetched from the worker."""
    fetch = DupFd.detach

    def stops_first(self: DupFd) -> int:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # before that it may still answer
        return fetch(self)

    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda *_: {})  # it has workers of its own
    monkeypatch.setattr(DupFd, "detach", stops_first)
    monkeypatch.setenv("SSL_PIPELINE_TIMEOUT", "4")
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(LostProcessError, match=r"has given nothing for 2 s .* in step 1"):
        with_worker(tmp_path)
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGALRM) is before


def stop_and_wake(seconds: float) -> subprocess.Popen[bytes]:
    """Stops this process's workers at once, and a second later this process, which alone is woken after some time."""
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    me = os.getpid()
    return subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {me}; sleep {seconds}; kill -CONT {me}"])


@pytest.mark.parametrize("at", ["the first batch", "a later batch"])
def test_a_run_that_was_stopped_with_its_workers_goes_on_to_the_same_bits(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-Z and fg, or in a container that was paused: for longer than a hang is waited for."""
    fetch, embed, stopped = DupFd.detach, SimCLR.embed, list[subprocess.Popen[bytes]]()

    def stops_first(self: DupFd) -> int:
        if not stopped and at == "the first batch":
            stopped.append(stop_and_wake(8))
        return fetch(self)

    def stops_later(self: SimCLR, batch: Batch) -> dict[str, Tensor]:
        if not stopped and batch.clock.step == 3:
            stopped.append(stop_and_wake(8))
        return embed(self, batch)

    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda *_: {})
    monkeypatch.setattr(DupFd, "detach", stops_first)
    monkeypatch.setattr(SimCLR, "embed", stops_later)
    monkeypatch.setenv("SSL_PIPELINE_TIMEOUT", "8")
    began = time.monotonic()
    disturbed = with_worker(tmp_path, steps=12)
    assert [process.wait() for process in stopped] == [0]
    assert time.monotonic() - began > 8
    monkeypatch.undo()
    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda *_: {})
    assert same_bytes(disturbed, with_worker(tmp_path, steps=12, name="whole"), ["encoder.safetensors"])


def test_patience_leaves_out_the_time_in_which_the_process_was_stopped() -> None:
    now = 0.0
    patience = Patience(10, clock=lambda: now)
    assert patience.interval == 1
    for passed, stopped, over in [(1, False, False)] * 9 + [(60, True, False)] + [(1, False, False)] * 10:
        now += passed
        assert (patience.tick(), patience.over) == (stopped, over)
    now += 1
    assert not patience.tick()
    assert patience.over
    patience.restart()
    assert not patience.over


@pytest.mark.parametrize(
    ("room", "waits"),
    [
        ("torch.distributed.distributed_c10d", True), ("torch.autograd.graph", True), ("accelerate.state", True),
        ("torch.utils.data.dataloader", False), ("ssl_pipeline.data.scan", False), ("threading", False), ("torchvision.io", False),
    ],
)  # fmt: skip
def test_a_thread_that_computes_nothing_waits_for_others_in_torch_alone(room: str, waits: bool) -> None:
    assert waits_in_torch(cast(FrameType, SimpleNamespace(f_globals={"__name__": room}))) == waits
    assert not waits_in_torch(None)


def test_an_error_about_something_else_is_left_alone() -> None:
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain(ValueError("Connection closed by peer")) is None


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan"])
def test_a_timeout_that_is_none_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PIPELINE_TIMEOUT", text)
    with pytest.raises(ConfigError, match="SSL_PIPELINE_TIMEOUT"):
        timeout_seconds()


def test_evaluation_counts_each_sample_once_on_three_processes(tmp_path: Path) -> None:
    done = ranks(3, "tests/fault/three_evaluate.py")
    assert done.returncode == 0, done.stderr
