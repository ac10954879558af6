"""Conditions of stage two that were measured with the same seeds: of a study, or of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_pipeline.metrics.interval import Interval, interval, paired_difference
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.stage_two import Table, first_seed, in_percent, measured_rows, seeds_of, shown, spoken


@dataclass(frozen=True)
class Comparison:
    """Values by condition and seed.

    Attributes:
        title: what was measured.
        values: per condition its figure at each seed.
        against: per condition the one that it is compared with, over the seeds that both have.
        baseline: what the conditions are compared with, for people.
        percent: whether the figure is a share.
        claimed: the conditions of the regime that was fixed beforehand; empty where none was.
    """

    title: str
    values: dict[str, dict[int, float]]
    against: dict[str, str] = field(default_factory=dict)
    baseline: str = ""
    percent: bool = True
    claimed: tuple[str, ...] = ()

    def mean(self, name: str) -> Interval:
        """A condition's mean with its interval."""
        return interval(list(self.values[name].values()))

    def difference(self, name: str) -> Interval | None:
        """From what it is compared with, paired by seed; None where there is nothing to compare."""
        ours, theirs = self.values[name], self.values.get(self.against.get(name, ""), {})
        shared = [seed for seed in ours if seed in theirs]
        return paired_difference([ours[s] for s in shared], [theirs[s] for s in shared]) if shared else None

    def headline(self) -> tuple[str, Interval] | None:
        """The first claimed condition that is compared, or the first one of all; None where nothing is compared.

        The one that gained most would be a choice by the figures that it is then praised for.
        """
        found = {name: gain for name in self.values if (gain := self.difference(name)) is not None}
        first = next((name for name in [*self.claimed, *found] if name in found), None)
        return None if first is None else (first, found[first])

    def table(self) -> Table:
        """Each condition with its interval and the paired difference."""
        columns = ["condition", "mean ± 95 %", *([f"against {self.baseline}"] if self.baseline else []), "seeds"]
        rows = []
        for name, values in self.values.items():
            gain = self.difference(name)
            against = [shown(gain, self.percent, signed=True) if gain else "—"] if self.baseline else []
            rows.append([name, shown(self.mean(name), self.percent), *against, str(len(values))])
        note = "Differences are paired by seed; an interval that contains 0 is no gain." if self.baseline else ""
        return Table(self.title, columns, rows, note)


def study_comparison(run: RunRecord) -> Comparison | None:
    """What a study compared, from its rows; None where it has none."""
    rows = measured_rows(run.study)
    if not rows:
        return None
    counts = list(dict.fromkeys(row.get("labels") for row, _ in rows))
    values: dict[str, dict[int, float]] = {}
    of: dict[tuple[Any, Any, Any], str] = {}
    for row, value in rows:
        name = condition(row, with_labels=len(counts) > 1)
        of[row.get("init"), row.get("regime"), row.get("labels")] = name
        of_name = values.setdefault(name, {})
        seed = row.get("seed")
        of_name[seed if isinstance(seed, int) else len(of_name)] = value
    base = run.study.get("baseline")
    against, baseline = dict[str, str](), ""
    if isinstance(base, dict):
        first, regime = base.get("init"), base.get("regime")
        against = {name: of.get((first, regime, labels), "") for (_, _, labels), name in of.items()}
        against = {name: other for name, other in against.items() if other not in ("", name)}
        baseline = condition(base, with_labels=False) if against else ""
    percent = run.study.get("in_percent")
    figure = str(run.study.get("figure", next(iter(rows[0][0]["figures"]))))
    split = f" on {run.study['split']}" if "split" in run.study else ""
    labels = f", {labels_in_words(counts[0])}" if len(counts) == 1 and counts[0] is not None else ""
    percent = percent if isinstance(percent, bool) else all(0 <= value <= 1 for _, value in rows)
    unit = " (%)" if percent else ""
    title = f"{run.name}: {spoken(figure)}{unit}{split}{labels}"
    claimed = tuple(name for (_, regime, _), name in of.items() if regime == run.study.get("claimed"))
    return Comparison(title, values, against, baseline, percent, claimed)


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


def runs_comparison(runs: Sequence[RunRecord]) -> Comparison | None:
    """Several stage-two runs as conditions, the first one the baseline; None unless two or more share their first figure."""
    measured = [run for run in runs if run.stage == "finetune" and seeds_of(run)]
    if len(measured) < 2:
        return None
    name = next(iter(seeds_of(measured[0])[0]))
    values = {
        run.name: {first_seed(run) + place: row[name] for place, row in enumerate(seeds_of(run)) if name in row}
        for run in measured
    }
    if not all(values.values()):
        return None
    first = measured[0].name
    percent = all(map(in_percent, measured))
    title = f"Runs compared: {spoken(name)}{' (%)' if percent else ''}"
    return Comparison(title, values, {run.name: first for run in measured[1:]}, first, percent)
