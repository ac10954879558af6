"""The page's tables: metrics with their intervals, confusion, domains, and how runs were set up."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssl_pipeline.config.base import flatten
from ssl_pipeline.evaluation.result import is_share
from ssl_pipeline.metrics.interval import Interval, interval
from ssl_pipeline.report.read import RunRecord, measured_rows

_MOST_CLASSES = 40
ABSENT = "—"


@dataclass(frozen=True)
class Table:
    """A table for people: the first column is text, the others are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def results_table(run: RunRecord) -> Table | None:
    """Each metric's mean with its interval, and its value at each seed."""
    rows, percent = run.seeds, run.in_percent
    if not rows:
        return None
    cells = []
    for name in rows[0]:
        if all(name in row for row in rows):
            share, values = is_share(name, percent), [row[name] for row in rows]
            cells.append([spoken(name), *(shown(interval(part), share) for part in (values, *([v] for v in values)))])
    unit = " (%)" if percent else ""
    columns = ["metric", "mean ± 95 %", *(f"seed {run.first_seed + place}" for place in range(len(rows)))]
    return Table(f"{run.name}: {title_of(run)} on {run.results.get('split', '?')}{unit}", columns, cells)


def title_of(run: RunRecord) -> str:
    """What a stage-two run did, in a few words."""
    return f"{spoken(run.named('regime'))} {spoken(run.named('downstream'))}".strip() or "stage two"


def confusion(run: RunRecord) -> dict[str, Any] | None:
    """The confusion matrix of ``results.json``: ``{"classes": [names], "matrix": [[count of true row, told column]]}``.

    Returns:
        Classes, and rows of cells with their count and their share of the true class; None where there is none, it is not
        square, or it has more classes than a page can show.
    """
    found = run.results.get("confusion")
    matrix = found.get("matrix") if isinstance(found, dict) else None
    if not isinstance(matrix, list) or not 0 < len(matrix) <= _MOST_CLASSES:
        return None
    if any(not isinstance(row, list) or len(row) != len(matrix) for row in matrix):
        return None
    if any(not isinstance(cell, int | float) or not math.isfinite(cell) for row in matrix for cell in row):
        return None
    classes = run.results["confusion"].get("classes") or run.card.get("classes")
    named = isinstance(classes, list) and len(classes) == len(matrix)
    names = list(map(str, classes if named and classes else range(len(matrix))))
    rows = [[{"count": int(v), "share": v / max(1, sum(row))} for v in row] for row in matrix]
    return {"run": run.name, "classes": names, "rows": list(zip(names, rows, strict=True))}


def domain_table(run: RunRecord) -> Table | None:
    """The table of ``domain.json``: rows of ``{"method", "source", "target", "seed", "figures": {name: value}}``."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row, value in measured_rows(run.domain):
        key = spoken(str(row.get("method", "?"))), str(row.get("source", "?"))
        cells.setdefault(key, {}).setdefault(str(row.get("target", "?")), []).append(value)
    if not cells:
        return None
    targets = list(dict.fromkeys(target for found in cells.values() for target in found))
    body = [
        [method, source, *(interval(found[t]).percent() if t in found else ABSENT for t in targets)]
        for (method, source), found in cells.items()
    ]
    return Table(f"{run.name}: by domain (%)", ["method", "trained on", *targets], body)


def shown(value: Interval, percent: bool, signed: bool = False) -> str:
    """A mean with its interval; of one seed the mean alone."""
    if percent:
        return value.percent(signed)
    mean = f"{value.mean:+.4g}" if signed else f"{value.mean:.4g}"
    return mean if value.half == float("inf") else f"{mean} ± {value.half:.2g}"


def spoken(name: str) -> str:
    """A key as words."""
    return {"lp_ft": "LP-FT"}.get(name, name.replace("_", " "))


def condition(row: dict[str, Any], with_labels: bool) -> str:
    """What a row's condition is called."""
    parts = [spoken(str(row[key])) for key in ("init", "regime") if row.get(key) is not None]
    labels = [labels_in_words(row["labels"])] if with_labels and row.get("labels") is not None else []
    return ", ".join([*parts, *labels]) or "condition"


def labels_in_words(labels: Any) -> str:
    """A study's label count: a number of each class, a share, or all."""
    if isinstance(labels, int):
        return f"{labels} a class"
    return "all labels" if labels == "all" else f"{str(labels).removesuffix('%')} % of the labels"


def duration(seconds: float | None) -> str:
    """Such as ``2 min 10 s``."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts = [f"{count} {unit}" for count, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if count]
    return " ".join(parts[:2]) or "0 s"


def difference(runs: Sequence[RunRecord]) -> Table | None:
    """The keys whose values differ, side by side; a stage's runs are compared among themselves only."""
    rows = list[list[str]]()
    for stage in ("pretrain", "finetune", "study"):
        settings = [flatten(run.config) if run.stage == stage else None for run in runs]
        keys = sorted({key for values in settings if values is not None for key in values})
        for key in keys:
            cells = [None if values is None else _written(values, key) for values in settings]
            if len(set(cells) - {None}) > 1:
                rows.append([key, *(cell or "" for cell in cells)])
    return Table("Settings that differ", ["key", *(run.name for run in runs)], rows) if rows else None


def system(runs: Sequence[RunRecord]) -> Table:
    """What each run ran on, of a continued one at its last start: command, commit, device, threads, versions; and times."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    rows = [[name, *(of_run.get(name, ABSENT) for of_run in facts)] for name in names]
    return Table("System", ["", *(run.name for run in runs)], rows)


def _facts(run: RunRecord) -> dict[str, str]:
    start = run.starts[-1] if run.starts else {}
    versions, command, began = start.get("versions"), start.get("command"), ABSENT
    if isinstance(command, list):  # earlier versions kept words
        command = shlex.join(map(str, command))
    if run.began is not None:
        began = datetime.datetime.fromtimestamp(run.began, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = {
        "folder": str(run.folder),
        "state": run.state,
        "started": began,
        "duration": duration(run.seconds),
        "starts": str(len(run.starts)),
        "device": str(start.get("device") or "not recorded"),
        "threads": str(start.get("threads", ABSENT)),
        "commit": str(start.get("commit") or ABSENT)[:12],
        "command": str(command or ABSENT),
    }
    return facts | ({str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {})


def _written(settings: dict[str, Any], key: str) -> str:
    """A setting as YAML has it."""
    value = settings.get(key, ABSENT)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
