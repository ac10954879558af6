"""``metrics.jsonl``: one JSON object a line. The truth that all mirrors repeat."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssl_pipeline.logging.names import TRAINING_STEP
from ssl_pipeline.logging.run import earlier_starts, write_text_atomic

FILE_NAME = "metrics.jsonl"
_NO_NUMBERS = ("nan", "inf", "-inf")  # what JSON can't hold as numbers, and is written as strings


class JsonlLogger:
    """Appends figures to a file, a line at a time; each line is there as soon as it is logged.

    Args:
        path: the file, such as a run's ``metrics.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """Writes the figures after ``step`` steps."""
        line = {"step": int(step), "time": round(time.time(), 3)} | {name: _plain(v) for name, v in figures.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops lines beyond a checkpoint's step, which a continued run repeats, and a line written by half.

        Stage two's lines of training stay: :meth:`forget_training_after` drops theirs, as soon as a training's checkpoint is known.
        """
        self._keep(lambda line: line["step"] <= step or TRAINING_STEP in line)

    def forget_training_after(self, step: int) -> None:
        """Drops stage two's lines of training beyond a step of theirs, likewise."""
        self._keep(lambda line: line.get(TRAINING_STEP, 0) <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        self._file.close()
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if (read := _read(line)) is not None and wanted(read)]
        write_text_atomic(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def finish(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, numbers as numbers; a line written by half is left out.

    Args:
        path: the file, or the run folder that holds it.
    """
    file = path / FILE_NAME if path.is_dir() else path
    lines = (_read(line) for line in file.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [{k: float(v) if v in _NO_NUMBERS else v for k, v in line.items()} for line in lines if line is not None]


def _plain(value: Any) -> float | str:
    """What JSON can hold of a figure; NumPy's and torch's scalars become numbers."""
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _read(line: str) -> dict[str, Any] | None:
    """A line's object, or None for what is no whole line: the process was killed, or the power went."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def seconds_before(folder: Path) -> float:
    """What a run's earlier starts took, by its log; the last start is the one that goes on."""
    *earlier, last = [
        datetime.datetime.fromisoformat(start["started"]).timestamp() for start in earlier_starts(folder)
    ] or [0.0]
    lines = read_metrics(folder) if earlier and (folder / FILE_NAME).exists() else []
    times = [line["time"] for line in lines if "time" in line]
    spans = zip(earlier, [*earlier, last][1:], strict=True)
    return sum(max([time - began for time in times if began <= time < ended], default=0.0) for began, ended in spans)
