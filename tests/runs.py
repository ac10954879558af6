"""Tiny runs of the real commands, for the tests that need a whole one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_pipeline.config.command import load
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.forks import run_all

ROOT = Path(__file__).parents[1]
FEW_IMAGES = "data.name=tests.few_images"
TINY_ON_ANY_DATA = [
    "tracking=off", "tracking.log_images=false", "transform.size=12", "backbone.width=4", "batch_size=32", "log_every=1",
    "pretext.hidden_width=32", "pretext.projection_width=16", "evaluate_every=0 steps",
]  # fmt: skip
TINY = [*TINY_ON_ANY_DATA, FEW_IMAGES]


SMALL_HEADS = {
    "hidden_width": 32, "projection_width": 16, "predictor_width": 32, "bottleneck_width": 16, "prototypes": 10, "queue": 48,
}  # fmt: skip


def small_pretext(name: str) -> list[str]:
    """A pretext task with small heads and memories, whatever it has of them."""
    known = importlib.import_module(f"ssl_pipeline.pretext.{name}").Config.model_fields
    sizes = [f"pretext.{key}={size}" for key, size in SMALL_HEADS.items() if key in known]
    return [f"pretext={name}", *sizes]


def tiny_pretrain(output: Path | None, *overrides: str) -> PretrainConfig:
    """A configuration of less than a second's work, on the data that it names or else on few images."""
    where = [f"output={output}"] if output is not None else []
    tiny = TINY_ON_ANY_DATA if any(word.startswith("data=") for word in overrides) else TINY
    return load("pretrain", PretrainConfig, [*tiny, "steps=4", *where, *overrides])


def tiny_words(encoder: Path, output: Path) -> list[str]:
    """What is told to stage two for a few seconds' work."""
    return [
        "tracking=off",
        "tracking.log_images=false",
        FEW_IMAGES,
        "labels.per_class=5",
        "split=val",
        f"encoder={encoder}",
        f"output={output}",
    ]


def tiny_finetune(encoder: Path, output: Path, *overrides: str) -> FinetuneConfig:
    """Likewise, for stage two: two steps, where a regime takes steps."""
    length = [] if "regime=frozen" in overrides else ["regime.length=2 steps", "regime.min_steps=0"]
    return load("finetune", FinetuneConfig, [*tiny_words(encoder, output), *length, *overrides])


def command(*words: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project with this interpreter's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def forked(
    *words: str | Path, cwd: Path = ROOT, seconds: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python's words in a process of its own that needs no start of an interpreter."""
    return run_all(words, [environment], cwd, seconds)


def ssl_pipeline(*words: str | Path, cwd: Path = ROOT, before: str = "") -> subprocess.CompletedProcess[str]:
    """``ssl-pipeline`` in a process of its own; ``before`` is Python that runs in it first."""
    return forked("-c", f"{before}from ssl_pipeline.cli import main; main()", *words, cwd=cwd)


def same_bytes(first: Path, second: Path, files: Sequence[str]) -> bool:
    """Whether two folders hold the same files."""
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
