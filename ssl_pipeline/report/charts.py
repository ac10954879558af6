"""The charts of runs: which logged metrics are drawn together, and their points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.report.read import RunRecord, measured_rows
from ssl_pipeline.report.tables import condition

_MOST_POINTS = 500  # of a line: a chart is not wider than that on a screen


class Point(NamedTuple):
    """A logged value; None where it is not known or no number. ``low`` and ``high`` are the ends of its interval."""

    step: float
    epoch: float | None
    seconds: float | None
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of a chart: of a run by its number on the page, or with a name of its own."""

    points: list[Point]
    run: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Chart:
    """One small chart.

    Attributes:
        key: its name in the page.
        panel: the panel that it stands in.
        title: for people.
        metrics: the logged metrics that it draws, by the last part of their names; the first one that a run has.
        unit: how its values are written: ``percent``, ``number`` or ``count``.
        help: one sentence that says how to read it.
        step_only: whether an evaluation's metric of this name is something else.
        axis: the name of its own horizontal axis; empty for steps, epochs and time.
        log: whether the vertical axis is logarithmic; None where a range of more than two decades makes it so.
        smooth: whether a long line is smoothed; a schedule is not.
        lines: what is drawn.
    """

    key: str
    panel: str
    title: str
    metrics: tuple[str, ...]
    unit: str
    help: str
    step_only: bool = False
    axis: str = ""
    log: bool | None = None
    smooth: bool = True
    lines: list[Line] = field(default_factory=list)


_LOGGED = (
    Chart("loss", "curves", "Loss", ("loss",), "number", "The pretext task's own loss; its value compares within a task only.", step_only=True),
    Chart("knn", "curves", "kNN accuracy on val", ("knn",), "percent", "How many held-out images their nearest neighbors classify correctly; step 0 is untrained."),
    Chart("lr", "curves", "Learning rate", ("lr",), "number", "Warm-up, then the schedule.", smooth=False),
    Chart("images_per_s", "curves", "Images per second", ("images_per_s",), "count", "Of all processes together."),
    Chart("data_wait", "curves", "Waiting for data", ("data_wait",), "percent", "The share of the time in which the model waited for images."),
    Chart("temperature", "temperature", "Temperature τ", ("temperature", "tau"), "number", "Below 1 it sharpens the softmax, above 1 it smooths it.", smooth=False),
    Chart("entropy_share", "temperature", "Entropy of the softmax", ("entropy_share",), "percent", "As a share of the maximum: 0 % is one candidate alone, 100 % all alike."),
    Chart("hardest_1pct", "temperature", "Gradient on the hardest 1 %", ("hardest_1pct",), "percent", "How much of the gradient falls on the most similar negatives."),
    Chart("hardest_5pct", "temperature", "Gradient on the hardest 5 %", ("hardest_5pct",), "percent", "The same for 5 %; the rest is shared by the easy ones."),
    Chart("p_positive", "temperature", "Probability of the positive", ("p_positive",), "percent", "What the softmax gives the other view of the same image."),
    Chart("effective_negatives", "temperature", "Effective negatives", ("effective_negatives",), "count", "How many negatives count, by the exponential of the entropy among them."),
    Chart("feature_std", "collapse", "Feature std", ("feature_std",), "number", "1 is spread evenly over the sphere, 0 is all alike: collapse."),
    Chart("effective_rank", "collapse", "Effective rank", ("effective_rank",), "count", "How many directions carry the features."),
    Chart("alignment", "collapse", "Alignment", ("alignment",), "number", "The distance of two views of an image: lower is closer."),
    Chart("uniformity", "collapse", "Uniformity", ("uniformity",), "number", "Lower is more evenly spread; 0 is collapse."),
)  # fmt: skip


def logged(runs: Iterable[RunRecord]) -> list[Chart]:
    """The charts of what stage-one runs logged, those that have a line."""
    numbered = [(number, run) for number, run in enumerate(runs) if run.stage == "pretrain"]
    found = []
    for chart in _LOGGED:
        drawn = [(number, points(run, chart.metrics, chart.step_only)) for number, run in numbered]
        lines = [Line(thin(rows), run=number) for number, rows in drawn if rows]
        if lines:
            found.append(replace(chart, lines=lines))
    return found


def spectra(found: Sequence[tuple[int, dict[str, Any]]]) -> list[Chart]:
    """The spectrum of the features' covariance and the spread of each dimension, both sorted, by the run's number."""

    def lines(key: str) -> list[Line]:
        return [Line([Point(n, None, None, v) for n, v in enumerate(one[key], 1)], run=number) for number, one in found]

    charts = [
        Chart("spectrum", "collapse", "Spectrum of the features", (), "percent",
              "Each principal direction's share of the variance; a cliff means that few directions carry all.",
              axis="direction", log=True, lines=lines("share")),
        Chart("std", "collapse", "Std per dimension", (), "number",
              "Sorted; 1 is spread evenly over the sphere, dimensions at 0 are dead.", axis="dimension", lines=lines("std")),
    ]  # fmt: skip
    return charts if found else []


def label_efficiency(runs: Sequence[RunRecord]) -> list[Chart]:
    """The metric over the number of labels, a line an initialization and regime; for studies of several numbers."""
    lines, percent = list[Line](), True
    for run in runs:
        in_percent = run.study.get("in_percent") is not False
        grouped: dict[str, dict[float, list[float]]] = {}
        for row, value in measured_rows(run.study):
            count = row.get("label_count")
            if isinstance(count, int | float):
                grouped.setdefault(condition(row, with_labels=False), {}).setdefault(float(count), []).append(value)
        if max(map(len, grouped.values()), default=0) > 1:
            lines += [Line(_with_intervals(of, in_percent), name=name) for name, of in grouped.items()]
            percent = percent and in_percent
    unit, text = "percent" if percent else "number", "Over the number of labels, with 95 % intervals over the seeds."
    chart = Chart("label_efficiency", "stage-two", "Label efficiency", (), unit, text, axis="labels", lines=lines)
    return [chart] if lines else []


def _with_intervals(by_labels: dict[float, list[float]], in_percent: bool) -> list[Point]:
    rows = []
    for labels in sorted(by_labels):
        found = interval(by_labels[labels])
        ends: list[float | None] = [found.low, found.high] if math.isfinite(found.half) else [None, None]
        if in_percent:  # Student's t of few seeds reaches beyond what a share can be
            ends = [None if end is None else min(1.0, max(0.0, end)) for end in ends]
        rows.append(Point(labels, None, None, found.mean, *ends))
    return rows


def points(run: RunRecord, metrics: tuple[str, ...], step_only: bool = False) -> list[Point]:
    """A metric over the run: the first of these names that was logged."""
    times = [line.get("time") for line in run.lines]
    known = [float(time) for time in times if isinstance(time, int | float)]
    began = run.began or (known[0] if known else 0.0)
    per_epoch = steps_per_epoch(run)
    for wanted in metrics:
        rows = list[Point]()
        for line, time in zip(run.lines, times, strict=True):
            value = _value(line, wanted, step_only)
            if value is not None:
                epoch = None if per_epoch is None else round(line["step"] / per_epoch, 4)
                seconds = round(time - began, 1) if isinstance(time, int | float) else 0.0
                shown = float(f"{value:.6g}") if math.isfinite(value) else None
                rows.append(Point(line["step"], epoch, seconds, shown))
        if rows:
            return rows
    return []


def values(run: RunRecord, metric: str, step_only: bool = False) -> list[float]:
    """A metric's finite values, from first to last."""
    return [row.value for row in points(run, (metric,), step_only) if row.value is not None]


def first_and_last(run: RunRecord, metric: str) -> tuple[float, float] | None:
    """A metric before training and at the end; None where it was not measured twice."""
    found = values(run, metric)
    return (found[0], found[-1]) if len(found) > 1 else None


def last(run: RunRecord, metric: str, step_only: bool = False) -> float | None:
    """A metric's last value."""
    return next(reversed(values(run, metric, step_only)), None)


def steps_per_epoch(run: RunRecord) -> float | None:
    """From a line that was logged with its epoch."""
    for line in reversed(run.lines):
        epoch = _value(line, "epoch", step_only=False)
        if epoch is not None and epoch > 0 and line["step"] > 0:
            return float(line["step"] / epoch)
    return None


def thin(rows: list[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Every n-th row, the last one always."""
    stride = -(-len(rows) // most)
    return rows if stride <= 1 else [*rows[: len(rows) - 1 : stride], rows[-1]]


def _value(line: dict[str, Any], wanted: str, step_only: bool) -> float | None:
    for name, value in line.items():
        group, _, metric = name.rpartition("/")
        skipped = not group or (step_only and group in ("eval", "untrained"))
        if metric == wanted and not skipped and isinstance(value, int | float):
            return float(value)
    return None
