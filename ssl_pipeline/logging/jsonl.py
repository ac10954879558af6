"""``metrics.jsonl``: one JSON object a line, and the names of the metrics in it, which all loggers share."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssl_pipeline.config.files import atomic_write_text
from ssl_pipeline.logging.run import earlier_starts

FILE_NAME = "metrics.jsonl"
GROUPS = {
    "pretrain": "stage one's own metrics: loss, rate, epoch",
    "temperature": "the temperature, and what it does to a batch",
    "eval": "the encoder on `val` while stage one runs",
    "untrained": "the same before the first step",
    "finetune": "stage two while it trains, by its own axis `finetune/step`",
    "val": "stage two on `val`, by seed",
    "test": "stage two on `test`, by seed",
    "study": "a study's means, by the number of labeled images",
    "system": "speed, waiting, bad files",
    "media": "images: their files in the run's folder",
}
TRAINING_STEP = "finetune/step"  # optimizer steps of all loops of a stage-two run
_SYSTEM = ("images_per_s", "data_wait", "bad_files")
_TEMPERATURE = {"temperature": "tau"} | {
    name: name for name in ("entropy_share", "effective_negatives", "p_positive", "hardest_1pct", "hardest_5pct")
}
_NO_NUMBERS = ("nan", "inf", "-inf")  # JSON can't hold them as numbers: they are written as strings


def full_name(stage: str, name: str) -> str:
    """A step's metric with its group, such as ``pretrain/loss`` or ``system/images_per_s``."""
    if name in _SYSTEM:
        return f"system/{name}"
    return f"temperature/{_TEMPERATURE[name]}" if name in _TEMPERATURE else f"{stage}/{name}"


class JsonlLogger:
    """Appends metrics to a file, a line at a time; each line is there as soon as it is logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        line = {"step": int(step), "time": round(time.time(), 3)} | {name: _plain(v) for name, v in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops lines beyond a checkpoint's step, which a continued run repeats, and half-written lines.

        The lines of stage two's loops stay: :meth:`truncate_training` drops theirs as soon as a loop's checkpoint is known.
        """
        self._keep(lambda line: line["step"] <= step or TRAINING_STEP in line)

    def truncate_training(self, step: int) -> None:
        """Drops the lines of stage two's loops beyond one of their steps."""
        self._keep(lambda line: line.get(TRAINING_STEP, 0) <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        self._file.close()
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if (read := _read(line)) is not None and wanted(read)]
        atomic_write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def finish(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, given as the file or its run folder; half-written lines are left out."""
    file = path / FILE_NAME if path.is_dir() else path
    lines = (_read(line) for line in file.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [{k: float(v) if v in _NO_NUMBERS else v for k, v in line.items()} for line in lines if line is not None]


def _plain(value: Any) -> float | str:
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _read(line: str) -> dict[str, Any] | None:
    """A line's object; None for a half-written line: the process was killed, or the power went."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def seconds_before(folder: Path) -> float:
    """Seconds that a run's earlier starts took, by its ``metrics.jsonl``; the last start is the one that goes on."""
    *earlier, last = [
        datetime.datetime.fromisoformat(start["started"]).timestamp() for start in earlier_starts(folder)
    ] or [0.0]
    lines = read_metrics(folder) if earlier and (folder / FILE_NAME).exists() else []
    times = [line["time"] for line in lines if "time" in line]
    spans = zip(earlier, [*earlier, last][1:], strict=True)
    return sum(max([time - began for time in times if began <= time < ended], default=0.0) for began, ended in spans)
