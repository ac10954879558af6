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

ROOT = Path(__file__).parents[1]
TINY = [
    "tracking=off", "tracking.pictures=false", "views.size=12", "backbone.width=4", "batch.size=32", "log_every=1", "data.dev=4000",
    "pretext.hidden_width=32", "pretext.projection_width=16", "evaluate_every=0 steps",
]  # fmt: skip


SMALL_HEADS = {
    "hidden_width": 32, "projection_width": 16, "predictor_width": 32, "bottleneck_width": 16, "prototypes": 10, "queue": 48,
}  # fmt: skip


def small_pretext(name: str) -> list[str]:
    """A pretext task with small heads and memories, whatever it has of them."""
    known = importlib.import_module(f"ssl_pipeline.pretext.{name}").Config.model_fields
    sizes = [f"pretext.{key}={size}" for key, size in SMALL_HEADS.items() if key in known]
    return [f"pretext={name}", *sizes]


def tiny_pretrain(output: Path | None, *overrides: str) -> PretrainConfig:
    """A configuration of a few seconds' work."""
    where = [f"output={output}"] if output is not None else []
    return load("pretrain", PretrainConfig, [*TINY, "steps=4", *where, *overrides])


def tiny_words(encoder: Path, output: Path) -> list[str]:
    """What is told to stage two for a few seconds' work."""
    return [
        "tracking=off",
        "tracking.pictures=false",
        "data.dev=4000",
        "labels.per_class=5",
        "split=dev",
        f"encoder={encoder}",
        f"output={output}",
    ]


def tiny_finetune(encoder: Path, output: Path, *overrides: str) -> FinetuneConfig:
    """Likewise, for stage two."""
    return load("finetune", FinetuneConfig, [*tiny_words(encoder, output), *overrides])


def command(*words: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project with this interpreter's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def ssl_pipeline(*words: str | Path, cwd: Path = ROOT, before: str = "") -> subprocess.CompletedProcess[str]:
    """``ssl-pipeline`` in a process of its own; ``before`` is Python that runs in it first."""
    main = f"{before}from ssl_pipeline.cli import main; main()"
    return command(sys.executable, "-c", main, *words, cwd=cwd)


def same_bytes(first: Path, second: Path, files: Sequence[str]) -> bool:
    """Whether two folders hold the same files."""
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
