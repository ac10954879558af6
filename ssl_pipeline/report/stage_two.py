"""Stage two's tables: figures with their intervals, confusion and domains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ssl_pipeline.config.base import UserError
from ssl_pipeline.config.schema import component
from ssl_pipeline.evaluation.result import is_share
from ssl_pipeline.metrics.interval import Interval, interval
from ssl_pipeline.report.read import RunRecord

_MOST_CLASSES = 40


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: its caption.
        columns: the first one is text, the others are figures.
        rows: cells as they are shown.
        note: one sentence below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def seeds_of(run: RunRecord) -> list[dict[str, float]]:
    """A stage-two run's figures, seed by seed; what is no number is left out."""
    figures = run.results.get("figures")
    rows = [row for row in figures if isinstance(row, dict)] if isinstance(figures, list) else []
    return [found for row in rows if (found := numbers(row))]


def numbers(figures: Any) -> dict[str, float]:
    """The figures that are finite numbers; nothing of what is no mapping."""
    items = figures.items() if isinstance(figures, dict) else ()
    known = {str(name): float(value) for name, value in items if isinstance(value, int | float)}
    return {name: value for name, value in known.items() if math.isfinite(value)}


def measured_rows(record: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The rows of a study's or domain's record, each with the record's figure or else its first; those without are left out."""
    rows = record.get("rows")
    found = []
    for row in rows if isinstance(rows, list) else []:
        figures = numbers(row.get("figures")) if isinstance(row, dict) else {}
        name = record["figure"] if record.get("figure") in figures else next(iter(figures), None)
        if name is not None:
            found.append((row, figures[name]))
    return found


def first_seed(run: RunRecord) -> int:
    """The number of a stage-two run's first seed."""
    seed = run.config.get("seed", 0)
    return seed if isinstance(seed, int) else 0


def in_percent(run: RunRecord) -> bool:
    """Whether its figures are shares."""
    try:
        return bool(
            getattr(component("downstream", "downstream", run.config.get("downstream", {})), "in_percent", False)
        )
    except UserError:
        return all(0 <= value <= 1 for row in seeds_of(run) for name, value in row.items() if is_share(name, True))


def results_table(run: RunRecord) -> Table | None:
    """Each figure's mean with its interval, and its value at each seed."""
    rows = seeds_of(run)
    if not rows:
        return None
    percent, seed = in_percent(run), first_seed(run)
    names = [name for name in rows[0] if all(name in row for row in rows)]
    cells = [
        [
            spoken(name),
            shown(interval([row[name] for row in rows]), is_share(name, percent)),
            *(_one(row[name], is_share(name, percent)) for row in rows),
        ]
        for name in names
    ]
    unit = " (%)" if percent else ""
    columns = ["figure", "mean ± 95 %", *(f"seed {seed + place}" for place in range(len(rows)))]
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
    assert isinstance(found, dict)
    classes = found.get("classes") or run.card.get("classes")
    classes = classes if isinstance(classes, list) else []
    names = [str(name) for name in classes] if len(classes) == len(matrix) else [str(i) for i in range(len(matrix))]
    rows = [[{"count": int(v), "share": v / max(1, sum(row))} for v in row] for row in matrix]
    return {"run": run.name, "classes": names, "rows": list(zip(names, rows, strict=True))}


def domain_table(run: RunRecord) -> Table | None:
    """The table of ``domain.json``: rows of ``{"method", "source", "target", "seed", "figures": {name: value}}``."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row, value in measured_rows(run.domain):
        key = spoken(str(row.get("method", "?"))), str(row.get("source", "?"))
        cells.setdefault(key, {}).setdefault(str(row.get("target", "?")), []).append(value)
    targets = list(dict.fromkeys(target for found in cells.values() for target in found))
    if not cells:
        return None
    body = [
        [method, source, *(interval(found[t]).percent() if t in found else "—" for t in targets)]
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


def _one(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"
