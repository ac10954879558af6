"""Stage two's tables: figures with their intervals, differences paired by seed, confusion and domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssl_pipeline.config.base import UserError
from ssl_pipeline.config.resolve import component
from ssl_pipeline.evaluate.interval import Interval, interval, paired_difference
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


@dataclass(frozen=True)
class Comparison:
    """Conditions that were measured with the same seeds.

    Attributes:
        values: per condition its figure, seed by seed.
        seeds: per condition the seeds, in the same order.
        baseline: what the others are compared with; None where nothing says so.
    """

    values: dict[str, list[float]]
    seeds: dict[str, list[int]]
    baseline: str | None

    def difference(self, name: str) -> Interval | None:
        """Against the baseline over the seeds that both have; None where there are none."""
        if self.baseline is None or name == self.baseline:
            return None
        ours = dict(zip(self.seeds[name], self.values[name], strict=True))
        theirs = dict(zip(self.seeds[self.baseline], self.values[self.baseline], strict=True))
        shared = [seed for seed in ours if seed in theirs]
        return paired_difference([ours[s] for s in shared], [theirs[s] for s in shared]) if shared else None


def seeds_of(run: RunRecord) -> list[dict[str, float]]:
    """A stage-two run's figures, seed by seed; what is no number is left out."""
    figures = run.results.get("figures")
    rows = [row for row in figures if isinstance(row, dict)] if isinstance(figures, list) else []
    return [found for row in rows if (found := numbers(row))]


def numbers(figures: Any) -> dict[str, float]:
    """The figures that are numbers; nothing of what is no mapping."""
    items = figures.items() if isinstance(figures, dict) else ()
    return {str(name): float(value) for name, value in items if isinstance(value, int | float)}


def measured_rows(record: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The rows of a study's or domain's record, each with the first of its figures; those without one are left out."""
    rows = record.get("rows")
    found = (
        [(row, numbers(row.get("figures"))) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    )
    return [(row, next(iter(figures.values()))) for row, figures in found if figures]


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
        return all(0 <= value <= 1 for row in seeds_of(run) for value in row.values())


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
            shown(interval([row[name] for row in rows]), percent),
            *(_one(row[name], percent) for row in rows),
        ]
        for name in names
    ]
    unit = " (%)" if percent else ""
    columns = ["figure", "mean ± 95 %", *(f"seed {seed + place}" for place in range(len(rows)))]
    return Table(f"{run.name}: {title_of(run)} on {run.results.get('split', '?')}{unit}", columns, cells)


def title_of(run: RunRecord) -> str:
    """What a stage-two run did, in a few words."""
    regime, downstream = _name(run.config.get("regime")), _name(run.config.get("downstream"))
    return f"{spoken(regime)} {spoken(downstream)}".strip() or "stage two"


def study_comparison(run: RunRecord) -> Comparison | None:
    """What a study compared, from either form of its ``study.json``."""
    baseline = run.study.get("baseline")
    values, seeds = _from_rows(measured_rows(run.study))
    if not values and isinstance(accuracy := run.study.get("accuracy"), dict):
        values = {str(name): list(map(float, found)) for name, found in accuracy.items() if isinstance(found, list)}
        seeds = {name: list(range(len(found))) for name, found in values.items()}
    if not values:
        return None
    return Comparison(values, seeds, baseline if baseline in values else None)


def _from_rows(rows: list[tuple[dict[str, Any], float]]) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Values and seeds of rows of ``init``, ``regime``, ``labels``, ``seed`` and ``figures``, by condition."""
    values, seeds = dict[str, list[float]](), dict[str, list[int]]()
    for row, value in rows:
        name = _condition(row)
        values.setdefault(name, []).append(value)
        seeds.setdefault(name, []).append(int(row.get("seed", len(values[name]) - 1)))
    return values, seeds


def _condition(row: dict[str, Any]) -> str:
    if "condition" in row:
        return str(row["condition"])
    parts = [spoken(str(row[key])) for key in ("init", "regime") if row.get(key) is not None]
    labels = [f"{row['labels']} labels"] if row.get("labels") is not None else []
    return " · ".join([*parts, *labels]) or "condition"


def comparison_table(title: str, found: Comparison) -> Table:
    """Each condition with its interval and, where there is a baseline, the paired difference from it."""
    columns = ["condition", "mean ± 95 %", *([f"against {found.baseline}"] if found.baseline else []), "seeds"]
    rows = []
    for name, values in found.values.items():
        difference = found.difference(name)
        against = [difference.percent(signed=True) if difference else "—"] if found.baseline else []
        rows.append([name, interval(values).percent(), *against, str(len(values))])
    note = "Differences are paired by seed; an interval that contains 0 is no gain." if found.baseline else ""
    return Table(title, columns, rows, note)


def runs_comparison(runs: Sequence[RunRecord]) -> Comparison | None:
    """Several stage-two runs as conditions, the first one the baseline; None unless two or more share their first figure."""
    measured = [run for run in runs if run.stage == "finetune" and seeds_of(run)]
    if len(measured) < 2:
        return None
    name = next(iter(seeds_of(measured[0])[0]))
    values = {run.name: [row[name] for row in seeds_of(run) if name in row] for run in measured}
    if not all(values.values()) or not all(map(in_percent, measured)):
        return None
    seeds = {run.name: [first_seed(run) + place for place in range(len(values[run.name]))] for run in measured}
    return Comparison(values, seeds, measured[0].name)


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
    assert isinstance(found, dict)
    classes = found.get("classes") or run.card.get("classes") or []
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


def shown(value: Interval, percent: bool) -> str:
    """A mean with its interval; of one seed the mean alone."""
    if percent:
        return value.percent()
    return f"{value.mean:.4g}" if value.half == float("inf") else f"{value.mean:.4g} ± {value.half:.2g}"


def spoken(name: str) -> str:
    """A key as words."""
    return {"lp_ft": "LP-FT"}.get(name, name.replace("_", " "))


def _one(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"


def _name(tree: Any) -> str:
    return str(tree.get("name", "")) if isinstance(tree, dict) else ""
