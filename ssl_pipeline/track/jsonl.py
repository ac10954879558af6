"""``metrics.jsonl``: one JSON object a line. The truth that all mirrors repeat."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_pipeline.track.run import write_text_atomic


class JsonlLog:
    """Appends figures to a run's ``metrics.jsonl``.

    Args:
        folder: the run's.
        start_step: lines of later steps are dropped first: they belong to steps that a continued run repeats.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= start_step]
            write_text_atomic(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", buffering=1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One line; what is no finite number is written as a string, which JSON can hold."""
        values = {key: value if math.isfinite(value) else str(value) for key, value in figures.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def finish(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's lines, with numbers as numbers."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in line.items()} for line in lines]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # half a line, written when the power went
        return math.inf
