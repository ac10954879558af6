"""Ctrl-C saves a run at its step's end and says how to go on; workers say nothing; a second one leaves at once."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ssl_pipeline.config.base import StoppedByHand
from ssl_pipeline.config.command import run_command, stopped_by_hand
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine import signals
from ssl_pipeline.evaluation.plot_views import PictureConfig
from ssl_pipeline.finetune import finetune
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.study import jobs
from tests.fault.launched import launched
from tests.fault.test_signals import send_at
from tests.forks import Forked
from tests.integration.test_study import artifact
from tests.runs import TINY_ON_ANY_DATA, same_bytes, tiny_finetune, tiny_pretrain
from tests.unit.test_loader import photos


def interrupted(words: list[str], ready: Path, cwd: Path, lines: int = 0) -> tuple[int, str]:
    """Runs a command in a terminal's stead, and signals all of its processes once a file is there.

    Returns:
        Exit code, and what it said on standard error.
    """
    said = cwd / "said"
    process = Forked([Path(sys.executable).parent / words[0], *words[1:]], Path(os.devnull), said, cwd, session=True)
    until = time.monotonic() + 120
    while not ready.exists() or (lines and len(ready.read_bytes().splitlines()) < lines):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(60), said.read_text()


def test_a_run_with_workers_is_saved_and_the_command_that_is_said_goes_on(tmp_path: Path) -> None:
    photos(tmp_path / "my photos", 8, 24, 16)
    words = [*TINY_ON_ANY_DATA, "data=folder", "data.path='my photos'", "batch_size=4", "num_workers=2", "steps=100000"]
    run = tmp_path / "run"
    code, said = interrupted(["ssl-pipeline", "pretrain", *words, "output=run"], run / "metrics.jsonl", tmp_path, 4)
    assert code == 130, said
    assert len(said.splitlines()) == 1, said
    saved = next((run / "checkpoints").glob("step-*.pt"))
    assert f"Ctrl-C after step {int(saved.stem[5:])} of 100000, its state is saved" in said
    assert shlex.split(said.split("`")[1]) == ["ssl-pipeline", "pretrain", *words, "output=run", "resume=auto"]
    assert not (run / "requeue").exists()


def test_a_study_leaves_its_workers_silent(tmp_path: Path) -> None:
    encoder = artifact(tmp_path / "enc", 0)
    long = [f"overrides.{regime}=['regime.length=100000 steps']" for regime in ("lp_ft", "scratch")]
    own = [str(encoder), "labels=[1]", "seeds=2", "regimes=[lp_ft]", "jobs=2", *long]
    common = ["data=embedded", "data.val=300", "split=val"]
    words = ["ssl-pipeline", "study", *own, "output=out", "--", *common]
    code, said = interrupted(words, tmp_path / "out" / "features", tmp_path)
    assert code == 130, said
    assert len(said.splitlines()) == 1, said
    assert shlex.split(said.split("`")[1]) == words


def test_an_interrupt_amid_the_start_of_workers_waits_for_its_end() -> None:
    """Whichever thread the kernel hands it to: the mask of the main one does not hold Python's handler back."""
    leave = threading.Event()
    other = threading.Thread(target=leave.wait)
    other.start()
    steps: list[str] = []

    def start() -> None:
        with jobs._deaf_to_interrupts():
            signal.pthread_kill(other.ident or 0, signal.SIGINT)
            time.sleep(0.1)
            steps.append("started whole")

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        leave.set()
        other.join()
    assert steps == ["started whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_processes_are_saved_under_a_launcher(tmp_path: Path) -> None:
    run = launched(tmp_path / "run")
    run.wait_for_steps(2)
    run.launch.send_signal(signal.SIGINT)
    code, log = run.leave(60)
    assert code == 130, log
    assert log.count("stopped by Ctrl-C after step") == 1
    assert f"go on by the same command with `output={run.folder} resume=auto`" in log
    assert "Traceback" not in log
    assert list((run.folder / "checkpoints").glob("step-*.pt"))


def test_a_notebook_gets_a_keyboard_interrupt_and_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 6, its state is saved: go on by `output=") as stop:
        pretrain(tiny_pretrain(tmp_path / "parts", "steps=6"))
    assert isinstance(stop.value, StoppedByHand)
    assert stop.value.folder == tmp_path / "parts"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signals.pending_signal() == 0
    monkeypatch.undo()
    parts = pretrain(tiny_pretrain(tmp_path / "parts", "steps=6", "resume=auto"))
    whole = pretrain(tiny_pretrain(tmp_path / "whole", "steps=6"))
    assert same_bytes(whole, parts, ["encoder.safetensors"])


def test_stage_two_is_saved_in_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, after, steps = artifact(tmp_path / "enc", 0), signals.pending_signal, iter(range(1, 10))

    def at_step_three() -> int:
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return after()

    monkeypatch.setattr("ssl_pipeline.engine.train_state.pending_signal", at_step_three)
    config = tiny_finetune(encoder, tmp_path / "run", "regime=end_to_end", "regime.length=9 steps")
    with pytest.raises(StoppedByHand, match="after step 3 of "):
        finetune(config)
    assert (tmp_path / "run" / "checkpoints" / "seed-0" / "all_layers" / "step-000000003.pt").is_file()


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While data are opened no folder is there; while the untrained backbone is measured it is, and is named."""

    def interrupts(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ssl_pipeline.evaluation.online.OnlineEvaluation.__call__", interrupts)
    with pytest.raises(StoppedByHand, match="stopped by Ctrl-C: go on by"):
        pretrain(tiny_pretrain(tmp_path / "run"))
    monkeypatch.setattr("ssl_pipeline.pretrain.open_training", interrupts)
    with pytest.raises(KeyboardInterrupt) as stop:
        pretrain(tiny_pretrain(tmp_path / "other"))
    assert str(stopped_by_hand(stop.value, "pretrain", True)) == "stopped by Ctrl-C."
    assert stopped_by_hand(stop.value, "pretrain", True).exit_code == 130
    assert not (tmp_path / "other").exists()


def test_an_interrupt_that_a_library_turns_into_its_own_error_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(_: PictureConfig) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    with pytest.raises(SystemExit) as left:
        run_command("plot_views", PictureConfig, draw, [])
    assert left.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_leaves_a_command_at_once_and_a_notebook_by_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = {number: signal.getsignal(number) for number in (*signals.HEARD, signal.SIGINT)}
    try:
        signals.install_signal_handlers()
        with signals.looping():
            os.kill(os.getpid(), signal.SIGINT)
            assert (signals.pending_signal(), left) == (signal.SIGINT, [])
            monkeypatch.setenv("LOCAL_RANK", "0")  # a launcher passes a terminal's signal on
            os.kill(os.getpid(), signal.SIGINT)
            assert left == []
            monkeypatch.delenv("LOCAL_RANK")
            os.kill(os.getpid(), signal.SIGINT)
            assert left == [130]
    finally:
        signals.reset_signals()
        for number, handler in before.items():
            signal.signal(number, handler)

    def twice(self: SimCLR, batch: Batch) -> None:
        del self, batch
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SimCLR, "after_step", twice)
    with pytest.raises(StoppedByHand, match="stopped by Ctrl-C: go on by"):
        pretrain(tiny_pretrain(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    assert not multiprocessing.active_children()
