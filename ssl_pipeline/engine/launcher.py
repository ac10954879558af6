"""``launch/run``: `accelerate launch` with what it lacks: signals reach the run, no process is left over, exit codes survive.

It imports nothing large, so that it handles signals from the start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from ssl_pipeline.config.command import EXIT_CODES, LOST

STAGES = ("pretrain", "finetune")
USAGE = """usage: launch/run [OPTIONS OF `accelerate launch` …] pretrain|finetune [key=value …]

SIGTERM, SIGUSR1 and SIGINT are passed on to the run's processes. Exit codes: 0 done, 2 wrong input, 75 a signal came and the
run is saved (start the same command again with `resume=auto`), 130 the same by Ctrl-C, others: failed.
"""
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAVED, _WRONG_INPUT, _BY_HAND = 75, 2, 130
_SECONDS_TO_LEAVE, _SECONDS_AFTER_A_LOSS = 30.0, 5.0
_PARENT_DIES, _ADOPT_ORPHANS = 1, 36  # prctl's PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER


def command_line(arguments: Sequence[str]) -> list[str]:
    """The command that starts a stage, from ``launch/run``'s arguments.

    Raises:
        SystemExit: with 2, no stage is named.
    """
    place = next((i for i, word in enumerate(arguments) if word in STAGES), None)
    if place is None:
        sys.stderr.write(USAGE)
        raise SystemExit(_WRONG_INPUT)
    options, stage, overrides = arguments[:place], arguments[place], arguments[place + 1 :]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    return [*accelerate, *options, "-m", f"ssl_pipeline.{stage}", *overrides]


class Launch:
    """One run of a stage, and its processes.

    Args:
        command: starts `accelerate launch`.
        codes: the file in which the run's processes leave their exit codes.
    """

    def __init__(self, command: Sequence[str], codes: Path) -> None:
        self._codes = codes
        self._signal = 0
        self._launcher: subprocess.Popen[bytes] | None = None
        _prctl(_ADOPT_ORPHANS, 1)
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        # In a session of its own a terminal's Ctrl-C reaches the run once, by us.
        self._launcher = subprocess.Popen(
            command, env={**os.environ, EXIT_CODES: str(codes)}, start_new_session=True, preexec_fn=_die_with_parent
        )
        if self._signal:  # it came before the launcher was there
            self._pass_on(self._signal, None)

    def wait(self) -> int:
        """Waits for the run, ends what it left over, and returns the exit code."""
        launcher = self._launcher
        assert launcher is not None
        while (code := launcher.poll()) is None:
            time.sleep(0.2)
            if LOST in self._exit_codes():
                self._end_the_others(launcher)
        _end(psutil.Process().children(recursive=True))
        for known in (_SAVED, _BY_HAND, _WRONG_INPUT, LOST):
            if known in self._exit_codes():
                return known
        if code == 0:
            return 0
        if self._signal in (signal.SIGTERM, signal.SIGUSR1) and not self._exit_codes():
            return _SAVED  # it died of the signal before it handled any, or had two: what it has saved is whole
        return 128 + (self._signal or -code) if self._signal or code < 0 else code

    def _exit_codes(self) -> list[int]:
        return [int(word) for word in self._codes.read_text().split()]

    def _end_the_others(self, launcher: subprocess.Popen[bytes]) -> None:
        """Kills what hangs of a group that has lost a process; the launcher is slow to do so."""
        others = psutil.Process(launcher.pid).children()
        for process in psutil.wait_procs(others, _SECONDS_AFTER_A_LOSS)[1]:
            process.kill()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Sends the signal to the run's processes: the launcher would kill them half a minute later, or leave them alone."""
        del frame
        self._signal = number
        if self._launcher is None:
            return
        run = psutil.Process(self._launcher.pid).children() if self._launcher.poll() is None else []
        for process in run or psutil.Process().children():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--help"], ["-h"]):
        sys.stdout.write(USAGE)
        return
    command = command_line(arguments)
    with tempfile.NamedTemporaryFile(prefix="ssl-pipeline-exit-codes-") as codes:
        code = Launch(command, Path(codes.name)).wait()
    raise SystemExit(code)


def _end(left: list[psutil.Process]) -> None:
    for process in left:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in psutil.wait_procs(left, _SECONDS_TO_LEAVE)[1]:
        process.kill()


def _prctl(option: int, value: int) -> None:
    """Linux's prctl; elsewhere an orphan of a killed launcher is left alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _die_with_parent() -> None:
    _prctl(_PARENT_DIES, signal.SIGKILL)


def save_with_launcher() -> None:
    """Under ``launch/run``: a process whose own launcher is killed gets SIGTERM, so that it saves and exits."""
    if EXIT_CODES in os.environ:
        _prctl(_PARENT_DIES, signal.SIGTERM)
