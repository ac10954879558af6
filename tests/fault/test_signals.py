"""A signal saves the run at the end of its step, leaves a marker, and the run goes on from there to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import EXIT_CODES, exit_with_error
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine import signals
from ssl_pipeline.engine.launcher import command_line
from ssl_pipeline.engine.signals import StoppedError
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from tests.fault.launched import launched
from tests.ranks import TWO
from tests.runs import TINY, forked, same_bytes, tiny_pretrain
from tests.unit.test_loader import photos

OF_TIME = ("time", "system/images_per_s", "system/data_wait")


@pytest.fixture
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*signals.HEARD, signal.SIGINT)}
    signals.install_signal_handlers()
    yield
    signals.reset_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def send_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int, workers: bool = False) -> None:
    def after_step(self: SimCLR, batch: Batch) -> None:
        if batch.clock.step == step:
            for process in multiprocessing.active_children() if workers else ():
                assert process.pid is not None
                os.kill(process.pid, number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(SimCLR, "after_step", after_step)


@pytest.mark.parametrize("number", signals.HEARD)
def test_a_signaled_run_is_saved_and_continues_to_the_same_bits(
    number: signal.Signals, listening: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_at(monkeypatch, 2, number)
    with pytest.raises(StoppedError, match=f"{number.name} after step 4 of 8") as stopped:
        pretrain(tiny_pretrain(tmp_path / "parts", "steps=8"))
    assert stopped.value.exit_code == 75
    assert (tmp_path / "parts" / "requeue").is_file()
    assert (tmp_path / "parts" / "checkpoints" / "step-000000004.pt").is_file()
    monkeypatch.undo()
    signals.reset_signals()
    parts = pretrain(tiny_pretrain(tmp_path / "parts", "steps=8", "resume=auto"))
    assert not (parts / "requeue").exists()
    whole = pretrain(tiny_pretrain(tmp_path / "whole", "steps=8"))
    assert same_bytes(whole, parts, ["encoder.safetensors"])
    losses = [[line.get("pretrain/loss") for line in read_metrics(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]


def test_workers_leave_the_signal_to_the_run(listening: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system signals every process of a job, the workers too."""
    (tmp_path / "photos").mkdir()
    photos(tmp_path / "photos", 16, 24, 16)
    send_at(monkeypatch, 1, signal.SIGTERM, workers=True)
    words = ["data=folder", f"data.path={tmp_path / 'photos'}", "batch_size=4", "num_workers=1", "steps=20"]
    config = tiny_pretrain(tmp_path / "run", *words, "~data.val")
    with pytest.raises(StoppedError, match="after step 3 of 20"):
        pretrain(config)


def test_a_signal_while_it_evaluates_waits_for_the_figures(
    listening: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = OnlineEvaluation.__call__

    def signaled(self: OnlineEvaluation, encoder: Encoder) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return looks(self, encoder)

    monkeypatch.setattr(OnlineEvaluation, "__call__", signaled)
    with pytest.raises(StoppedError, match="after step 1 of 8"):  # the first look is at the untrained backbone
        pretrain(tiny_pretrain(tmp_path / "run", "steps=8", "evaluate_every=1 steps"))
    assert ["eval/knn" in line for line in read_metrics(tmp_path / "run")] == [False, True]


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_lasts_is_cut_short_and_made_up_for(
    step: int, listening: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, words = OnlineEvaluation._collapse, ["steps=8", "evaluate_every=4 steps", "log_every=4"]
    whole = pretrain(tiny_pretrain(tmp_path / "whole", *words))
    before = iter(range(step // 4))  # after the look at the untrained backbone

    def signaled(self: OnlineEvaluation, encoder: Encoder) -> dict[str, float]:
        if next(before, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return looks(self, encoder)

    monkeypatch.setattr(OnlineEvaluation, "_collapse", signaled)
    monkeypatch.setattr(signals, "_SECONDS_FOR_AN_EVALUATION", -1.0)
    with pytest.raises(StoppedError, match=f"after step {step} of 8: its state is saved"):
        pretrain(tiny_pretrain(tmp_path / "parts", *words))
    assert [line["step"] for line in read_metrics(tmp_path / "parts")] == list(range(0, step, 4))
    monkeypatch.undo()
    signals.reset_signals()
    parts = pretrain(tiny_pretrain(tmp_path / "parts", *words, "resume=auto"))
    assert same_bytes(whole, parts, ["encoder.safetensors", "best/encoder.safetensors"])
    lines = [
        [{name: value for name, value in line.items() if name not in OF_TIME} for line in read_metrics(run)]
        for run in (whole, parts)
    ]
    assert lines[0] == lines[1]


def test_a_signal_to_one_process_cuts_the_evaluation_of_all(tmp_path: Path) -> None:
    run, codes = tmp_path / "run", tmp_path / "codes"
    words = [*TINY, "steps=9", "evaluate_every=3 steps", f"output={run}"]
    done = forked(*TWO, "tests/fault/slow_look.py", *words, SSL_PIPELINE_EXIT_CODES=str(codes))
    assert codes.read_text().split() == ["75", "75"], done.stderr
    assert done.stderr.count("stopped by SIGTERM after step 3 of 9: its state is saved") == 1
    assert (run / "requeue").is_file()
    saved = run / "checkpoints" / "step-000000003.pt"
    assert saved.stat().st_mtime - (run / "signaled").stat().st_mtime < 20


def test_the_last_step_is_finished(listening: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_at(monkeypatch, 2, signal.SIGTERM)
    done = pretrain(tiny_pretrain(tmp_path / "run", "steps=4"))
    assert (done / "encoder.safetensors").is_file()
    assert not (done / "requeue").exists()


def test_a_second_signal_leaves_at_once_but_an_echo_does_not(listening: None, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (signals.pending_signal(), left) == (signal.SIGTERM, [])
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert left == [128 + signal.SIGUSR1]


def test_two_processes_are_saved_and_nothing_is_left(tmp_path: Path) -> None:
    run = launched(tmp_path / "run")
    run.wait_for_steps(3)
    began = time.monotonic()
    run.launch.send_signal(signal.SIGUSR1)
    code, log = run.leave(60)
    assert code == 75, log
    assert time.monotonic() - began < 20
    assert log.count("stopped by SIGUSR1") == 1
    assert "Traceback" not in log
    assert (run.folder / "requeue").is_file()
    steps = max(line["step"] for line in read_metrics(run.folder))
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == [f"step-{steps:09d}.pt"]


def test_exit_codes_reach_the_launcher_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXIT_CODES, str(tmp_path / "codes"))
    for error in (ConfigError("a"), StoppedError(signal.SIGTERM, 1, 2, saved=True)):
        with pytest.raises(SystemExit):
            exit_with_error(error)
    assert (tmp_path / "codes").read_text().split() == ["2", "75"]


def test_the_launch_is_accelerates(capsys: pytest.CaptureFixture[str]) -> None:
    words = command_line(["--num_processes", "4", "finetune", "encoder=pretrain"])
    assert words[words.index("launch") :] == [
        "launch", "--quiet", "--num_processes", "4", "-m", "ssl_pipeline.finetune", "encoder=pretrain",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        command_line(["--num_processes", "4"])
    assert left.value.code == 2
    assert "usage: launch/run" in capsys.readouterr().err
