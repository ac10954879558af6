"""What a study of label efficiency found: a table with differences paired by seed, sentences, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pipeline.metrics.interval import Interval, Verdict, interval, paired_difference, verdicts
from ssl_pipeline.study.grid import StudyConfig

Row = dict[str, Any]
Condition = tuple[str, str]  # initialization and regime
_WORDS: dict[Verdict, str] = {
    "gain": "a gain", "loss": "a loss", "no difference": "no gain beyond chance", "one seed": "one seed, which says nothing of chance",
}  # fmt: skip
# Okabe and Ito's colors, told apart by people with any kind of color vision; marks and dashes say the same in black and white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vP"
_FRESH = "#555555"


class StudyTable:
    """A study's rows (``init``, ``regime``, ``labels``, ``seed`` and ``figures`` each), by condition and label count."""

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
        fresh = [c for c in self.conditions if self.config.encoders[c[0]] == "random"]
        trained = [c for c in fresh if c[1] == "scratch"]
        return next(iter(trained or fresh), None)

    def against(self, condition: Condition, labels: int | str) -> Interval | None:
        """The difference from the baseline, paired by seed."""
        if self.baseline is None or condition == self.baseline:
            return None
        return paired_difference(self.values(condition, labels), self.values(self.baseline, labels))

    def format(self, value: Interval, signed: bool = False) -> str:
        """A value with its interval, in % where it is a share."""
        if self.in_percent:
            return value.percent(signed)
        mean = f"{value.mean:+.3f}" if signed else f"{value.mean:.3f}"
        return mean if value.half == float("inf") else f"{mean} ± {value.half:.3f}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: a condition each, with all label counts, and below them the differences from the baseline."""
        rows = [
            [
                f"{init}, {regime}",
                *(self.format(interval(self.values((init, regime), labels))) for labels in self.labels),
            ]
            for init, regime in self.conditions
        ]
        if self.baseline is not None:
            against = f" − {self.baseline[0]}, {self.baseline[1]}"
            for condition in self.conditions:
                found = [self.against(condition, labels) for labels in self.labels]
                differences = [self.format(one, signed=True) for one in found if one is not None]
                if differences:
                    rows.append([f"{condition[0]}, {condition[1]}{against}", *differences])
        return ["", *map(named, self.labels)], rows

    def sentences(self) -> list[str]:
        """What each pretrained initialization brought in the claimed regime, a label count each; the last one sums up."""
        base, regime = self.baseline, self.config.trained_regime
        if base is None:
            return ["There is no random initialization among them, so nothing is said of what pretraining brought."]
        lines, gains, losses, open_ones = list[str](), list[str](), list[str](), list[str]()
        claimed = [c for c in self.conditions if c[1] == regime and self.config.encoders[c[0]] != "random"]
        unit = " points" if self.in_percent else ""
        found = {(c, labels): self.against(c, labels) for c in claimed for labels in self.labels}
        differences = {key: one for key, one in found.items() if one is not None}
        found_of = verdicts(list(differences.values()))
        how = "95 % interval, paired by seed"
        how += f"; verdict corrected for {len(found_of)} comparisons by Holm" if len(found_of) > 1 else ""
        for ((condition, labels), difference), verdict in zip(differences.items(), found_of, strict=True):
            place = f"{condition[0]} with {named(labels)}"
            lines.append(
                f"{place}: {regime} against {base[0]} {base[1]} {self.format(difference, signed=True)}{unit} in {self.figure}"
                f" ({how}): {_WORDS[verdict]}."
            )
            {"gain": gains, "loss": losses}.get(verdict, open_ones).append(place)
        return [*lines, self._summary(gains, losses, open_ones)] if lines else ["Nothing pretrained was compared."]

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


def named(labels: int | str) -> str:
    """A label count in words."""
    if isinstance(labels, int):
        return f"{labels} a class"
    return "all labels" if labels == "all" else f"{labels.removesuffix('%')} % of the labels"


def draw_table(findings: StudyTable, files: Sequence[Path]) -> None:
    """Saves the picture, a panel for each regime: the metric over the number of labels, with 95 % intervals."""
    from matplotlib.figure import Figure

    regimes = list(dict.fromkeys(regime for _, regime in findings.conditions if regime != "scratch")) or ["scratch"]
    picture = Figure(figsize=(0.6 + 3.9 * len(regimes), 3.9), layout="constrained")
    axes = picture.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    scale = 100 if findings.in_percent else 1
    pretrained = [name for name in findings.config.encoders if findings.config.encoders[name] != "random"]
    places = {labels: findings.count(labels) for labels in findings.labels}
    for panel, regime in zip(axes, regimes, strict=True):
        # What is trained from fresh weights stands in each panel of what is trained, to compare with.
        shown = [c for c in findings.conditions if c[1] == regime or (c[1] == "scratch" and regime != "frozen")]
        for nth, condition in enumerate(shown):
            fresh = condition[0] not in pretrained
            index = 0 if fresh else pretrained.index(condition[0])
            values = [interval(findings.values(condition, labels)) for labels in findings.labels]
            panel.errorbar(
                # Moved aside a little, so that intervals do not hide one another.
                [places[labels] * 1.03 ** (nth - (len(shown) - 1) / 2) for labels in findings.labels],
                [scale * value.mean for value in values],
                [0 if value.half == float("inf") else scale * value.half for value in values],
                label=_label(condition), capsize=3, linewidth=1.6, markersize=6,
                color=_FRESH if fresh else _COLORS[index % len(_COLORS)],
                marker="x" if fresh else _MARKS[index % len(_MARKS)], linestyle="--" if fresh else "-",
            )  # fmt: skip
        panel.set(title=regime, xscale="log", xlabel="labeled images")
        panel.set_xticks(
            list(places.values()), [f"{count}\n{named(labels)}" for labels, count in places.items()], fontsize=8
        )
        panel.minorticks_off()
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False, loc="best")
    if findings.in_percent:  # an interval of few seeds may reach beyond what a share can be
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(max(low, 0), min(high, 100))
    split = next(iter(findings.rows))["split"]
    axes[0].set_ylabel(f"{findings.figure} on {split}{' (%)' if findings.in_percent else ''}")
    for file in files:
        picture.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)


def _label(condition: Condition) -> str:
    name = condition[0].replace("$", r"\$")  # a formula to matplotlib
    return f"{name}, scratch" if condition[1] == "scratch" else name
