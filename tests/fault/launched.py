"""A run of two real processes by ``launch/run``, to be disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

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
    launch: subprocess.Popen[bytes]
    log: Path

    def ranks(self) -> list[psutil.Process]:
        """Its processes, by rank."""
        launcher = psutil.Process(self.launch.pid).children()[0]
        return sorted(launcher.children(), key=lambda process: int(process.environ()["RANK"]))

    def wait_for_steps(self, steps: int) -> None:
        """Until so many steps are logged."""
        file, until = self.folder / "metrics.jsonl", time.monotonic() + 120
        while not file.exists() or len(file.read_text().splitlines()) < steps + 1:
            assert self.launch.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def leave(self, seconds: float) -> tuple[int, str]:
        """Its exit code and log, when all its processes are gone."""
        code = self.launch.wait(seconds)
        left = [p for p in psutil.process_iter(["cmdline"]) if f"output={self.folder}" in (p.info["cmdline"] or ())]
        assert not left
        return code, self.log.read_text()


def launched(folder: Path, *overrides: str, **environment: str) -> Launched:
    """Starts stage one on two processes, for many more steps than a test waits for."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    log = folder.with_suffix(".log")
    words = ["--config_file", "launch/accelerate/cpu_2.yaml", "pretrain", *TINY, "steps=100000", f"output={folder}"]
    with log.open("wb") as file:
        launch = subprocess.Popen(
            [sys.executable, ROOT / "launch" / "run", *words, *overrides], cwd=ROOT, env=env, stdout=file, stderr=file
        )
    return Launched(folder, launch, log)
