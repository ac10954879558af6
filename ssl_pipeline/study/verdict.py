"""What a study found: a table, differences that are paired by seed, and sentences, whose verdicts are corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ssl_pipeline.metrics.interval import LEVEL, Interval, holm, interval, paired_difference
from ssl_pipeline.study.grid import StudyConfig

Row = dict[str, Any]
Condition = tuple[str, str]  # initialization and regime


class StudyTable:
    """A study's rows, by condition and label count.

    Args:
        rows: ``init``, ``regime``, ``labels``, ``seed`` and ``figures`` each.
        config: the study.
        in_percent: whether the figure is a share, to be told in %.
    """

    def __init__(self, rows: Sequence[Row], config: StudyConfig, in_percent: bool) -> None:
        self.rows, self.config, self.in_percent = rows, config, in_percent
        self.figure = next(iter(rows[0]["figures"]))
        self.conditions: list[Condition] = list(dict.fromkeys((row["init"], row["regime"]) for row in rows))
        self.labels: list[int | str] = list(dict.fromkeys(row["labels"] for row in rows))

    def values(self, condition: Condition, labels: int | str) -> list[float]:
        """The figure, in the order of the seeds."""
        found = [row for row in self.rows if (row["init"], row["regime"], row["labels"]) == (*condition, labels)]
        return [row["figures"][self.figure] for row in sorted(found, key=lambda row: row["seed"])]

    def count(self, labels: int | str) -> int:
        """How many labeled images that is."""
        return int(next(row["label_count"] for row in self.rows if row["labels"] == labels))

    @property
    def baseline(self) -> Condition | None:
        """What pretraining is compared with: fresh weights, trained if anything is; None where there are none."""
        fresh = [c for c in self.conditions if self.config.initializations[c[0]] == "random"]
        trained = [c for c in fresh if c[1] == "scratch"]
        return next(iter(trained or fresh), None)

    def against(self, condition: Condition, labels: int | str) -> Interval | None:
        """The difference from the baseline, paired by seed."""
        if self.baseline is None or condition == self.baseline:
            return None
        return paired_difference(self.values(condition, labels), self.values(self.baseline, labels))

    def told(self, value: Interval, signed: bool = False) -> str:
        """A value with its interval, in % where it is a share."""
        if self.in_percent:
            return value.percent(signed)
        mean = f"{value.mean:+.3f}" if signed else f"{value.mean:.3f}"
        return mean if value.half == float("inf") else f"{mean} ± {value.half:.3f}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: a condition each, with all label counts, and below them the differences from the baseline."""
        rows = [
            [f"{init}, {regime}", *(self.told(interval(self.values((init, regime), labels))) for labels in self.labels)]
            for init, regime in self.conditions
        ]
        if self.baseline is not None:
            against = f" − {self.baseline[0]}, {self.baseline[1]}"
            for condition in self.conditions:
                found = [self.against(condition, labels) for labels in self.labels]
                told = [self.told(one, signed=True) for one in found if one is not None]
                if told:
                    rows.append([f"{condition[0]}, {condition[1]}{against}", *told])
        return ["", *map(named, self.labels)], rows

    def sentences(self) -> list[str]:
        """What each pretrained initialization brought in the claimed regime, a label count each; the last one sums up."""
        base, regime = self.baseline, self.config.trained_regime
        if base is None:
            return ["There is no random initialization among them, so nothing is said of what pretraining brought."]
        told, gains, losses, open_ones = list[str](), list[str](), list[str](), list[str]()
        claimed = [c for c in self.conditions if c[1] == regime and self.config.initializations[c[0]] != "random"]
        unit = " points" if self.in_percent else ""
        found = {(c, labels): self.against(c, labels) for c in claimed for labels in self.labels}
        differences = {key: one for key, one in found.items() if one is not None}
        corrected = holm([one.p for one in differences.values()])
        how = "95 % interval, paired by seed"
        how += f"; verdict corrected for {len(corrected)} comparisons by Holm" if len(corrected) > 1 else ""
        for ((condition, labels), difference), p in zip(differences.items(), corrected, strict=True):
            place = f"{condition[0]} with {named(labels)}"
            end = _verdict(difference, p)
            told.append(
                f"{place}: {regime} against {base[0]} {base[1]} {self.told(difference, signed=True)}{unit} in {self.figure}"
                f" ({how}): {end}."
            )
            {"a gain": gains, "a loss": losses}.get(end, open_ones).append(place)
        return [*told, self._summary(gains, losses, open_ones)] if told else ["Nothing pretrained was compared."]

    def _summary(self, gains: list[str], losses: list[str], open_ones: list[str]) -> str:
        if self.config.seeds < 2:
            return "One seed says nothing of chance: take more `seeds` to learn what pretraining brought."
        parts = [
            f"{verb} ({', '.join(places)})"
            for verb, places in (
                ("brought a gain", gains),
                ("brought no gain beyond chance", open_ones),
                ("did harm", losses),
            )
            if places
        ]
        return f"In the regime fixed beforehand, {self.config.trained_regime}, pretraining {', and '.join(parts)}."


def _verdict(difference: Interval, p: float) -> str:
    if math.isnan(p):
        return "one seed, which says nothing of chance"
    if p >= LEVEL:
        return "no gain beyond chance"
    return "a gain" if difference.mean > 0 else "a loss"


def named(labels: int | str) -> str:
    """A label count in words."""
    if isinstance(labels, int):
        return f"{labels} a class"
    return "all labels" if labels == "all" else f"{labels.removesuffix('%')} % of the labels"
