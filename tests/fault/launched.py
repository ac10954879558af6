"""A run of two real processes by ``launch/run``, to be disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.forks import Forked
from tests.runs import ROOT, TINY


@dataclass
class Launched:
    """A run under way.

    Attributes:
        folder: the run's.
        launch: `launch/run`.
        log: what it says.
    """

    folder: Path
    launch: Forked | subprocess.Popen[bytes]
    log: Path

    def ranks(self) -> list[psutil.Process]:
        """Its processes, by rank, in which order they are started."""
        launcher = psutil.Process(self.launch.pid).children()[0]
        return sorted(launcher.children(), key=lambda process: process.pid)

    def wait_for_steps(self, steps: int) -> None:
        """Until so many steps are logged."""
        file, until = self.folder / "metrics.jsonl", time.monotonic() + 300
        while not file.exists() or len(file.read_text().splitlines()) < steps + 1:
            assert self.launch.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def leave(self, seconds: float) -> tuple[int, str]:
        """Its exit code and log, when all its processes are gone."""
        code = self.launch.wait(seconds)
        assert not list(processes_with(self.log))
        return code, self.log.read_text()


def processes_with(file: Path) -> Iterator[psutil.Process]:
    """Those that have a file open."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(opened.path == str(file) for opened in process.open_files()):
                yield process


def launched(folder: Path, *overrides: str, interpreters: bool = False, **environment: str) -> Launched:
    """Starts stage one on two processes, for many more steps than a test waits for.

    Args:
        folder: the run's.
        overrides: more words of the configuration.
        interpreters: `launch/run`, the launcher and the run's processes are interpreters that start, and not forks.
        environment: further variables.
    """
    log = folder.with_suffix(".log")
    options = ["--config_file", "launch/accelerate/cpu_2.yaml"]
    words = ["launch/run", *options, "pretrain", *TINY, "steps=100000", f"output={folder}", *overrides]
    if not interpreters:
        return Launched(folder, Forked(words, log, environment=environment), log)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with log.open("wb") as file:
        launch = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=file)
    return Launched(folder, launch, log)
