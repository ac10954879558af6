"""Charts with an axis of their own: how the features' spread decays, and accuracy over the number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.report.comparison import condition
from ssl_pipeline.report.look import RunImages
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.stage_two import measured_rows


def spectra(looks: Sequence[tuple[int, RunRecord, RunImages]]) -> list[dict[str, Any]]:
    """The spectrum of the features' covariance, and the spread of each dimension, both sorted."""
    known = [(number, found.spectrum) for number, _, found in looks if found.spectrum]
    if not known:
        return []
    return [
        _chart("spectrum", "collapse", "Spectrum of the features", "percent", "direction",
               "Each principal direction's share of the variance; a cliff means that few directions carry all.", True,
               [{"run": number, "points": _sorted_points(found["share"])} for number, found in known]),
        _chart("std", "collapse", "Std per dimension", "number", "dimension",
               "Sorted; 1 is spread evenly over the sphere, dimensions at 0 are dead.", False,
               [{"run": number, "points": _sorted_points(found["std"])} for number, found in known]),
    ]  # fmt: skip


def label_efficiency(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The figure over the number of labels, a line an initialization and regime; for studies of several numbers."""
    lines, percent = [], True
    for run in runs:
        in_percent = run.study.get("in_percent") is not False
        grouped: dict[str, dict[float, list[float]]] = {}
        for row, value in measured_rows(run.study):
            count = row.get("label_count")
            if isinstance(count, int | float):
                name = condition(row, with_labels=False)
                grouped.setdefault(name, {}).setdefault(float(count), []).append(value)
        if max((len(by_labels) for by_labels in grouped.values()), default=0) > 1:
            lines += [
                {"name": name, "points": _with_intervals(by_labels, in_percent)} for name, by_labels in grouped.items()
            ]
            percent = percent and in_percent
    if not lines:
        return []
    return [
        _chart("label_efficiency", "stage-two", "Label efficiency", "percent" if percent else "number", "labels",
               "Over the number of labels, with 95 % intervals over the seeds.", False, lines),
    ]  # fmt: skip


def _with_intervals(by_labels: dict[float, list[float]], in_percent: bool) -> list[list[float | None]]:
    rows: list[list[float | None]] = []
    for labels in sorted(by_labels):
        found = interval(by_labels[labels])
        ends: list[float | None] = [found.low, found.mean + found.half] if found.half != float("inf") else [None, None]
        if in_percent:  # Student's t of few seeds reaches beyond what a share can be
            ends = [None if end is None else min(1.0, max(0.0, end)) for end in ends]
        rows.append([labels, None, None, found.mean, *ends])
    return rows


def _sorted_points(values: Sequence[float]) -> list[list[float | None]]:
    return [[place + 1, None, None, value] for place, value in enumerate(values)]


def _chart(
    key: str, panel: str, title: str, unit: str, axis: str, text: str, log: bool, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "key": key, "panel": panel, "title": title, "unit": unit, "axis": axis, "help": text, "log": log, "lines": lines,
    }  # fmt: skip
