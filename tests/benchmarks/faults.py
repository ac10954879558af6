"""SIGKILLs at random moments of a real run: is each resume exact, and how much is done twice? ``--rounds`` is the kills.

Every run is a process of its own, forked when all is imported, on files with worker processes or without. It is killed
while it starts, in a step, before an evaluation is told, or while a checkpoint is written, in turn, up to five times; then it
goes on to its end, and all that it leaves is compared with what a run leaves that nobody stopped. Every other kill hits the process
alone and not its workers: the run folder must be free at once though they are still there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.logging.jsonl import FILE_NAME, read_metrics
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.benchmarks.command import run

_STEPS, _SAVES, _LOOKS, _KILLS_OF_A_RUN = 40, 5, 8, 5
_OF_TIME = ("time", "system/images_per_s", "system/data_wait")  # what no two runs have in common
_POLL, _PATIENCE = 0.0005, 300.0  # seconds
_CHECKPOINTS = "checkpoints"


class _Process:
    """A pretraining in a process group of its own."""

    def __init__(self, pictures: Path, output: Path, workers: int) -> None:
        words = [
            "tracking=off", "tracking.log_images=false", "data=folder", f"data.path={pictures}", "transform.size=12", "backbone.width=8",
            "batch_size=16", f"steps={_STEPS}", f"save_every={_SAVES} steps", f"evaluate_every={_LOOKS} steps", "log_every=1",
            "pretext=moco_v2", "pretext.queue=48", "resume=auto", "data.max_bad_files=1", f"num_workers={workers}", f"output={output}",
        ]  # fmt: skip
        config = load("pretrain", PretrainConfig, words)
        self.output, self.began = output, time.perf_counter()
        self._log = output.with_suffix(".log")
        self.came, self._old_figures = self.saved(), self._figures()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _live(config, self._log)
        self._code: int | None = None

    def ended(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code is not None

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Whether it came so far before it ended.

        Raises:
            ConfigError: it failed, or is stuck.
        """
        until = time.monotonic() + _PATIENCE
        while not reached():
            if self.ended():
                if self._code != 0:
                    raise ConfigError(f"the run ended with {self._code}:\n{self._log.read_text()}")
                return False
            if time.monotonic() > until:
                self.kill(whole_group=True)
                raise ConfigError(f"the run is stuck:\n{self._log.read_text()}")
            time.sleep(_POLL)
        return True

    def kill(self, whole_group: bool) -> None:
        (os.killpg if whole_group else os.kill)(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._code = -signal.SIGKILL

    def has_begun(self) -> bool:
        """Whether its first step is told; what was told before and is to be done twice has been dropped by then."""
        return self._figures() != self._old_figures and self.told() > self.came

    def _figures(self) -> int | None:
        file = self.output / FILE_NAME
        return file.stat().st_ino if file.exists() else None

    def told(self) -> int:
        """The last step that is told."""
        try:
            lines = (self.output / FILE_NAME).read_text().split("\n")
        except FileNotFoundError:
            return 0
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0

    def saved(self) -> int:
        """The last step that a checkpoint of is there."""
        files = sorted((self.output / _CHECKPOINTS).glob("step-*.pt"))
        return int(files[-1].stem.removeprefix("step-")) if files else 0

    def half_written(self) -> bool:
        folder = self.output / _CHECKPOINTS
        return folder.is_dir() and any(path.name.endswith(".partial") for path in folder.iterdir())


def measure(rounds: int) -> dict[str, float]:
    """Kills, exact resumes, steps done twice, and what a resume's first step takes against a cold start's."""
    torch.set_num_threads(1)
    chance = random.Random(0)
    kills, exact, lost, half_written = 0, 0, [0], 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        _write_pictures(root / "pictures")
        whole = _Process(root / "pictures", root / "whole", workers=0)
        whole.wait_until(whole.has_begun)
        cold, warm = [time.perf_counter() - whole.began], list[float]()
        whole.wait_until(lambda: False)
        moments = cycle((_while_it_starts, _in_a_step, _before_an_evaluation_is_told, _in_a_write))
        number = 0
        while kills < rounds:
            number += 1
            start = partial(_Process, root / "pictures", root / f"run-{number}", workers=2 * (number % 2))
            run, kills_before = start(), kills
            while kills < min(rounds, kills_before + _KILLS_OF_A_RUN) and next(moments)(run, chance):
                run.kill(whole_group=kills % 2 == 0)
                kills += 1
                half_written += run.half_written()
                lost.append(run.told() - run.saved())
                run = start()
                if run.wait_until(run.has_begun):
                    (warm if run.came else cold).append(time.perf_counter() - run.began)
            run.wait_until(lambda: False)
            exact += (kills - kills_before) * _same(whole.output, run.output)
    return {
        "faults.kills": kills,
        "faults.exact_resumes": exact,
        "faults.kills_that_left_half_a_checkpoint": half_written,
        "faults.most_steps_done_twice": max(lost),
        "faults.steps_between_checkpoints": _SAVES,
        "faults.first_step_of_a_cold_start_s": statistics.median(cold),
        **({"faults.first_step_of_a_resume_s": statistics.median(warm)} if warm else {}),
    }


def _while_it_starts(run: _Process, chance: random.Random) -> bool:
    time.sleep(chance.uniform(0.02, 0.4))
    return not run.ended()


def _in_a_step(run: _Process, chance: random.Random) -> bool:
    run.wait_until(run.has_begun)
    target = run.told() + chance.randint(0, 2 * _SAVES)
    came = run.wait_until(lambda: run.told() >= target)
    time.sleep(chance.uniform(0, 0.05))
    return came and not run.ended()


def _before_an_evaluation_is_told(run: _Process, chance: random.Random) -> bool:
    """A step's line is written when its evaluation is done: the time before that is nearly all evaluation."""
    run.wait_until(run.has_begun)
    came = run.wait_until(lambda: run.told() % _LOOKS == _LOOKS - 1)
    time.sleep(chance.uniform(0, 0.1))
    return came and not run.ended()


def _in_a_write(run: _Process, chance: random.Random) -> bool:
    del chance
    run.wait_until(run.has_begun)  # what the last one left half written is gone by then
    return run.wait_until(run.half_written)


def _live(config: PretrainConfig, log: Path) -> None:
    """The forked process's whole life."""
    os.setsid()
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        pretrain(config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _same(whole: Path, parts: Path) -> bool:
    """Weights, optimizer, queue and teacher in bits, the encoders that are handed over, and all figures."""
    states = [Checkpoints(run / _CHECKPOINTS).load() for run in (whole, parts)]
    figures = [
        [{name: value for name, value in line.items() if name not in _OF_TIME} for line in read_metrics(run)]
        for run in (whole, parts)
    ]
    files = ("encoder.safetensors", "best/encoder.safetensors")
    return (
        _equal(states[0], states[1])
        and figures[0] == figures[1]
        and all((whole / name).read_bytes() == (parts / name).read_bytes() for name in files)
    )


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _write_pictures(root: Path, count: int = 40) -> None:
    """Noise about two colors, something that kNN can tell apart; one of the files is cut, and has to be counted once."""
    generator = np.random.default_rng(0)
    for name, color in (("blue", (40, 80, 200)), ("red", (200, 60, 40))):
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = generator.integers(-40, 41, (20, 20, 3))
            Image.fromarray((np.array(color) + noise).astype(np.uint8)).save(root / name / f"{number}.png")
    file = root / "red" / "7.png"
    file.write_bytes(file.read_bytes()[:-400])


if __name__ == "__main__":
    run(measure, __doc__)
