"""Many runs at the head of a page: the folder's name and a line a run, where sentences and names of all would fill a screen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.report.comparison import study_comparison
from ssl_pipeline.report.curves import first_and_last
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.stage_two import Table, in_percent, seeds_of, shown, spoken
from ssl_pipeline.report.summary import duration

_MOST_NAMES = 3
_NOTHING = "—"


def title(runs: Sequence[RunRecord]) -> str:
    """The names of a few runs; of more the name of the folder that holds them all."""
    if len(runs) <= _MOST_NAMES:
        return ", ".join(run.name for run in runs)
    folder = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    return folder.name or f"{len(runs)} runs"


def overview(runs: Sequence[RunRecord]) -> Table | None:
    """A line a run: what it is, whether it is done, and its first figure; None for a few, which are told in sentences."""
    if len(runs) <= _MOST_NAMES:
        return None
    rows = [[run.name, run.stage, run.state, _steps(run), duration(run.seconds), *_figure(run)] for run in runs]
    return Table(f"{len(runs)} runs", ["run", "stage", "state", "steps", "time", "figure", "value"], rows)


def _steps(run: RunRecord) -> str:
    """Optimizer steps of stage one; stage two's lines count seeds."""
    steps = max((line["step"] for line in run.lines), default=0) if run.stage == "pretrain" else 0
    return f"{steps:,}" if steps else _NOTHING


def _figure(run: RunRecord) -> tuple[str, str]:
    """The name and value of what a reader looks for first in a run of its stage."""
    if run.stage == "pretrain" and (knn := first_and_last(run, "knn")):
        return "kNN on dev, untrained → now", f"{100 * knn[0]:.1f} → {100 * knn[1]:.1f} %"
    if run.stage == "finetune" and (rows := seeds_of(run)) and rows[0]:
        name, percent = next(iter(rows[0])), in_percent(run)
        value = shown(interval([row[name] for row in rows if name in row]), percent)
        return spoken(name), value + (" %" if percent else "")
    if run.stage == "study" and (found := study_comparison(run)) and (told := found.headline()):
        gain = shown(told[1], found.percent, signed=True) + (" points" if found.percent else "")
        return f"{told[0]} against {found.baseline}", gain
    return _NOTHING, _NOTHING
