"""Run folders as the stages write them, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STARTED = "2026-01-02T03:04:05+00:00"
_START = 1767323045.0
HELD_OUT = [0.5, 0.6, 0.7]


def write_pretrain(folder: Path, steps: int = 20, temperature: float = 0.1, card: bool = True, **config: Any) -> Path:
    """Stage one's: kNN 0.5, 0.6, 0.7; the loss is 10 ÷ step; ten steps an epoch, one a second."""
    folder.mkdir(parents=True)
    tree = {
        "pretext": {"name": "simclr", "temperature": {"value": temperature}}, "backbone": {"name": "small_resnet"},
        "data": {"name": "embedded"}, "seed": 0, **config,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    write_start(folder)
    lines = [
        {
            "step": 0,
            "time": _START,
            "untrained/knn": HELD_OUT[0],
            "untrained/feature_std": 0.2,
            "untrained/effective_rank": 30.0,
        }
    ]
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step, "time": _START + step, "pretrain/loss": 10 / step, "pretrain/lr": 0.01, "pretrain/epoch": step / 10,
            "pretrain/temperature": temperature, "pretrain/entropy_share": 0.9, "pretrain/hardest_1pct": 0.4,
            "pretrain/data_wait": 0.05, "pretrain/images_per_s": 1000.0,
        }  # fmt: skip
        if step in (steps // 2, steps):
            line = {
                "eval/knn": HELD_OUT[1 + step // steps],
                "eval/loss": 77.0,
                "eval/feature_std": 0.8,
                "eval/effective_rank": 60.0,
            } | line  # whatever their order
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if card:
        (folder / "card.json").write_text(json.dumps({"schema_version": 1, "kind": "encoder"}))
    return folder


def write_finetune(folder: Path, accuracies: list[float], seed: int = 0, **results: Any) -> Path:
    """Stage two's, an accuracy a seed."""
    folder.mkdir(parents=True)
    tree = {
        "downstream": {"name": "classification"},
        "regime": {"name": "lp_ft"},
        "init": "pretrained",
        "seed": seed,
    }
    (folder / "config.yaml").write_text(json.dumps(tree))
    write_start(folder)
    lines = [
        {"step": seed + place, "time": _START + place, "test/accuracy": value} for place, value in enumerate(accuracies)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "split": "test",
        "seeds": len(accuracies),
        "figures": [{"accuracy": value} for value in accuracies],
        **results,
    }
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def write_study(folder: Path, record: dict[str, Any]) -> Path:
    """A study's, with the record it wrote."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"common": [], "overrides": {}}))
    write_start(folder)
    (folder / "study.json").write_text(json.dumps(record))
    return folder


def write_start(folder: Path) -> None:
    """A ``run.json`` of one start."""
    start = {
        "started": STARTED,
        "command": ["pretrain"],
        "commit": "c" * 40,
        "threads": 3,
        "versions": {"torch": "9.8.7"},
    }
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
