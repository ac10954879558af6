"""The curves of runs: which logged figures are drawn together, and their points."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ssl_pipeline.report.read import RunRecord

_MOST_POINTS = 1500  # of a line: more than a screen has columns only make the page larger
_UNTRAINED = "untrained"


@dataclass(frozen=True)
class Chart:
    """One small chart.

    Attributes:
        key: its name in the page.
        panel: the panel that it stands in.
        title: for people.
        figures: the logged figures that it draws, by the last part of their names; the first one that a run has.
        unit: how its values are written: ``percent``, ``number`` or ``count``.
        help: one sentence that says how to read it.
        log: whether it starts on a logarithmic scale.
        step_only: whether an evaluation's figure of this name is something else.
    """

    key: str
    panel: str
    title: str
    figures: tuple[str, ...]
    unit: str
    help: str
    log: bool = False
    step_only: bool = field(default=False)


CHARTS = (
    Chart("loss", "curves", "Loss", ("loss",), "number", "The pretext task's own loss; its value compares within a task only.", step_only=True),
    Chart("knn", "curves", "kNN accuracy on dev", ("knn",), "percent", "How many held-out images their nearest neighbors name rightly; step 0 is untrained."),
    Chart("lr", "curves", "Learning rate", ("lr",), "number", "Warm-up, then the schedule."),
    Chart("images_per_s", "curves", "Images per second", ("images_per_s",), "count", "Of all processes together."),
    Chart("data_wait", "curves", "Waiting for data", ("data_wait",), "percent", "The share of the time in which the model starved."),
    Chart("temperature", "temperature", "Temperature τ", ("temperature", "tau"), "number", "Below 1 it sharpens the softmax, above 1 it smooths it."),
    Chart("entropy_share", "temperature", "Entropy of the softmax", ("entropy_share",), "percent", "Of its greatest: 0 % looks at one candidate alone, 100 % at all alike."),
    Chart("hardest_1pct", "temperature", "Gradient on the hardest 1 %", ("hardest_1pct",), "percent", "How much of the push falls on the most similar negatives."),
    Chart("hardest_5pct", "temperature", "Gradient on the hardest 5 %", ("hardest_5pct",), "percent", "Likewise; the rest is shared by the easy ones."),
    Chart("p_positive", "temperature", "Probability of the positive", ("p_positive",), "percent", "What the softmax gives the other view of the same image."),
    Chart("effective_negatives", "temperature", "Effective negatives", ("effective_negatives",), "count", "How many negatives count, by the exponential of the entropy among them."),
    Chart("feature_std", "collapse", "Feature std", ("feature_std",), "number", "1 is spread evenly over the sphere, 0 is all alike: collapse."),
    Chart("effective_rank", "collapse", "Effective rank", ("effective_rank",), "count", "How many directions carry the features."),
    Chart("alignment", "collapse", "Alignment", ("alignment",), "number", "The distance of two views of an image: lower is closer."),
    Chart("uniformity", "collapse", "Uniformity", ("uniformity",), "number", "Lower is more evenly spread; 0 is collapse."),
)  # fmt: skip


def charts(runs: Iterable[RunRecord]) -> list[dict[str, Any]]:
    """The charts that have a line, for the page: each with its lines of ``[step, epoch, seconds, value]``."""
    stage_one = [(number, run) for number, run in enumerate(runs) if run.stage == "pretrain"]
    found = []
    for chart in CHARTS:
        lines = [
            {"run": number, "points": thin(shown)}
            for number, run in stage_one
            if (shown := points(run, chart.figures, chart.step_only))
        ]
        if lines:
            found.append({
                "key": chart.key, "panel": chart.panel, "title": chart.title, "unit": chart.unit, "help": chart.help,
                "log": chart.log, "lines": lines,
            })  # fmt: skip
    return found


def points(run: RunRecord, figures: tuple[str, ...], step_only: bool = False) -> list[list[float | None]]:
    """A figure's points; a value that is no finite number is a gap.

    Args:
        run: whose.
        figures: the last parts of names such as ``pretrain/loss``; the first one that was logged is taken.
        step_only: leaves out what an evaluation measured under the same name.

    Returns:
        Rows of step, epoch (None where that is not known), seconds since the start, and the value or None.
    """
    began = run.began or next((_time(line, 0.0) for line in run.lines), 0.0)
    per_epoch = steps_per_epoch(run)
    for wanted in figures:
        rows: list[list[float | None]] = []
        for line in run.lines:
            value = _value(line, wanted, step_only)
            if value is not None:
                epoch = None if per_epoch is None else round(line["step"] / per_epoch, 4)
                seconds = round(_time(line, began) - began, 1)
                rows.append([line["step"], epoch, seconds, float(f"{value:.6g}") if math.isfinite(value) else None])
        if rows:
            return rows
    return []


def first_and_last(run: RunRecord, figure: str) -> tuple[float, float] | None:
    """A figure before training and at the end; None where it was not measured twice."""
    values = [row[3] for row in points(run, (figure,)) if row[3] is not None]
    return (values[0], values[-1]) if len(values) > 1 else None


def last(run: RunRecord, figure: str, step_only: bool = False) -> float | None:
    """A figure's last value."""
    values = [row[3] for row in points(run, (figure,), step_only) if row[3] is not None]
    return values[-1] if values else None


def steps_per_epoch(run: RunRecord) -> float | None:
    """From a line that was logged with its epoch."""
    for line in reversed(run.lines):
        for name, value in line.items():
            if name.rpartition("/")[2] == "epoch" and isinstance(value, int | float) and value > 0 and line["step"] > 0:
                return float(line["step"] / value)
    return None


def thin(rows: list[list[float | None]], most: int = _MOST_POINTS) -> list[list[float | None]]:
    """Every n-th row, the last one always."""
    stride = -(-len(rows) // most)
    return rows if stride <= 1 else [*rows[: len(rows) - 1 : stride], rows[-1]]


def _time(line: dict[str, Any], otherwise: float) -> float:
    time = line.get("time")
    return float(time) if isinstance(time, int | float) else otherwise


def _value(line: dict[str, Any], wanted: str, step_only: bool) -> float | None:
    for name, value in line.items():
        group, _, figure = name.rpartition("/")
        skipped = not group or (step_only and group in ("eval", _UNTRAINED))
        if figure == wanted and not skipped and isinstance(value, int | float):
            return float(value)
    return None
