"""Stage two's metrics over its seeds: with their intervals, as rows of a table, and as a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_pipeline.logging.jsonl import FILE_NAME, read_metrics
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.interval import Interval, interval


@dataclass(frozen=True)
class Result:
    """What stage two measured on a held-out split.

    Attributes:
        figures: the metrics of each seed.
        confusion: of the first seed, where classes are predicted: ``classes``, and ``matrix`` with a row for each true one.
        selection: how many labels were learned from and held out, and why; see :func:`ssl_pipeline.downstream.plan.selection`.
    """

    folder: Path
    split: str
    figures: list[dict[str, float]] = field(default_factory=list)
    confusion: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for figures in self.figures for name in figures))

    def interval(self, name: str | None = None) -> Interval:
        """A metric's mean over the seeds that have it, with its 95 % interval; the first metric by default."""
        name = name or self.names[0]
        return interval([figures[name] for figures in self.figures if name in figures])

    def rows(self, in_percent: bool) -> list[list[str]]:
        found = {name: self.interval(name) for name in self.names}
        return [[n, value.percent() if is_share(n, in_percent) else _plain(value)] for n, value in found.items()]

    def keep_confusion(self) -> None:
        """Keeps the first seed's confusion for a run that is stopped before its last seed."""
        self._kept.parent.mkdir(exist_ok=True)
        write_json(self._kept, self.confusion)

    def take_confusion(self) -> None:
        if self._kept.exists():
            self.confusion.update(json.loads(self._kept.read_text(encoding="utf-8")))
        elif (self.folder / "results.json").exists():
            written = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
            self.confusion.update(written.get("confusion", {}))

    @property
    def _kept(self) -> Path:
        return self.folder / "checkpoints" / "confusion.json"

    def write(self) -> None:
        record: dict[str, Any] = {"split": self.split, "seeds": len(self.figures), "figures": self.figures}
        record |= {"labels": self.selection} if self.selection else {}
        record |= {"confusion": self.confusion} if self.confusion else {}
        write_json(self.folder / "results.json", record)


def finished_seeds(folder: Path, seeds: range, split: str) -> dict[int, dict[str, float]]:
    """The metrics of the seeds that a run has done before: a seed's line in ``metrics.jsonl`` is written last."""
    if not (folder / FILE_NAME).exists():
        return {}
    found, prefix = {}, f"{split}/"
    for line in read_metrics(folder):
        metrics = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
        if metrics and line["step"] in seeds:
            found[line["step"]] = metrics
    return found


def is_share(name: str, in_percent: bool) -> bool:
    """Whether a metric of a task that is measured in per cent is a share itself: entropies, distances and counts are not."""
    return in_percent and not name.startswith("label_free/") and not name.endswith("_measured")


def _plain(value: Interval) -> str:
    return f"{value.mean:.4g}" if value.half == float("inf") else f"{value.mean:.4g} ± {value.half:.2g}"
