"""``ssl-pipeline study RUN…``: did pretraining help? Initializations × regimes × label counts × seeds, in one table and picture.

Every cell of the grid is a file of its own, so that a study that was killed does only what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.config.values import listed, quoted
from ssl_pipeline.downstream.labels import draw
from ssl_pipeline.downstream.plan import selection
from ssl_pipeline.logging.logger import open_loggers
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import RunFolder, open_run, versions, write_json
from ssl_pipeline.metrics.interval import Interval, Verdict, interval, paired_difference, verdicts
from ssl_pipeline.models.weights import is_file_name
from ssl_pipeline.study.cells import Cell, Opener, check_draws, check_starts, slug
from ssl_pipeline.study.grid import StudyConfig, cells
from ssl_pipeline.study.jobs import train_cells

SCHEMA = 1
Row = dict[str, Any]
Condition = tuple[str, str]  # initialization and regime
_WORDS: dict[Verdict, str] = {
    "gain": "a gain", "loss": "a loss", "no difference": "no gain beyond chance", "one seed": "one seed, which says nothing of chance",
}  # fmt: skip
# Okabe and Ito's colors, told apart by people with any kind of color vision; marks and dashes say the same in black and white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vP"
_FRESH = "#555555"


def study(config: StudyConfig) -> Path:
    """Compares initializations, regimes and label counts of stage two, and says what pretraining bought."""
    grid, opener = cells(config), Opener()
    check_draws([cell for of_init in grid.values() for cell in of_init], opener)
    left_out = _check(grid, opener)
    for name, why in left_out.items():
        console().print(f"{name} is left out: {why}", markup=False)
    if left_out:  # fresh weights are of an architecture that is compared
        known = {name: what for name, what in config.encoders.items() if name not in left_out}
        if not set(known.values()) - {"random"}:
            raise ConfigError("none of the pretrained `encoders` can be had: give a run of stage one.")
        grid = cells(config.model_copy(update={"encoders": known}))
    settings = {"common": list(config.common), "overrides": dump(config)["overrides"]}
    with open_run(config.output, "study", "auto" if config.output else "no", settings) as run:
        all_cells = [cell for of_init in grid.values() for cell in of_init]
        firsts = [of_init[0] for of_init in grid.values()]
        _print_selection(config, all_cells, opener)
        models = [cell.name for cell in all_cells if config.models and cell.seed == firsts[0].seed]
        asks = [cell.name for cell in firsts if config.knn]
        rows, accuracies = train_cells(all_cells, run.path, opener, config.jobs, models, asks)
        knn = {cell.row["init"]: accuracies[cell.name] for cell in firsts if cell.name in accuracies}
        _track(config, _write(config, firsts[0], rows, left_out, knn, run.path), run)
        return run.path


def _check(grid: dict[str, list[Cell]], opener: Opener) -> dict[str, str]:
    """Checks what each initialization starts from; returns those that are left out, and why.

    Official weights that can't be had (no network, most likely) are no reason to stop; a wrong name is.
    """
    left_out = {}
    for name, of_init in grid.items():
        try:
            check_starts(of_init, opener)
        except ConfigError as error:
            own = of_init[0].config
            if own.encoder is not None or own.backbone.weights is None or is_file_name(own.backbone.weights):
                raise
            left_out[name] = str(error)
    return left_out


def _print_selection(config: StudyConfig, cells: Sequence[Cell], opener: Opener) -> None:
    """What `labels.validation=auto` comes to for each number of labels, in the regime that the summary speaks of."""
    for labels in config.labels:
        of_labels = [cell for cell in cells if cell.row["labels"] == labels]
        cell = next((cell for cell in of_labels if cell.row["regime"] == config.trained_regime), of_labels[0])
        own = cell.config
        if own.labels.validation == "auto":
            drawn = draw(own.labels, own.downstream, opener.sources(own)[0], cell.seed)
            why = selection(own.labels, own.downstream, own.regime, drawn)["why"]
            console().print(f"  {labels} ({cell.row['regime']}): {why}", markup=False)


def _write(
    config: StudyConfig, first: Cell, rows: list[dict[str, Any]], left_out: dict[str, str], knn: dict[str, float], folder: Path,
) -> StudyTable:  # fmt: skip
    downstream, split = first.config.downstream, first.config.split
    findings = StudyTable(rows, config, downstream.in_percent)
    unit = " (%)" if findings.in_percent else ""
    print_table(f"{findings.figure}{unit} on {split}, {config.seeds} seed(s)", *findings.table())
    notes = list(_shared(config))
    if knn:
        accuracies = ", ".join(f"{name} {100 * value:.1f} %" for name, value in knn.items())
        notes.insert(0, f"kNN (k = 20, all training labels): {accuracies}.")
    sentences = findings.sentences()
    console().print("\n".join([*notes, *sentences]), markup=False, highlight=False)
    kept = ("init", "regime", "labels", "label_count", "held_out", "seed", "split", "figures", "seconds")
    base = findings.baseline
    record = {
        "schema_version": SCHEMA, "task": downstream.name, "figure": findings.figure, "in_percent": findings.in_percent,
        "split": split, "encoders": dump(config)["encoders"], "left_out": left_out,
        "baseline": None if base is None else {"init": base[0], "regime": base[1]}, "reported_regime": config.trained_regime,
        "rows": [{key: row[key] for key in kept if key in row} for row in rows], "knn": knn, "notes": notes,
        "conclusion": sentences, "summary": sentences[-1], "versions": versions(),
    }  # fmt: skip
    write_json(folder / "study.json", record)
    draw_table(findings, [folder / "study.png", folder / "study.svg"])
    console().print(f"wrote {folder / 'study.json'}, study.png and study.svg", markup=False)
    return findings


def _track(config: StudyConfig, findings: StudyTable, run: RunFolder) -> None:
    """Logs the study as one run: each condition's mean by label count, and the picture; nothing without loggers."""
    tracking = config.tracking
    if tracking.name == "off" and not tracking.loggers:
        return
    with open_loggers(run, "study", dump(config), tracking, -1) as trackers:
        counts = {labels: findings.count(labels) for labels in findings.labels}
        for labels, count in sorted(counts.items(), key=lambda one: one[1]):
            means = {c: interval(findings.values(c, labels)).mean for c in findings.conditions}
            trackers.log(count, {f"study/{slug(init)}_{regime}": mean for (init, regime), mean in means.items()})
        with Image.open(run.path / "study.png") as picture:
            trackers.log_images(max(counts.values()), {"label_efficiency": picture.convert("RGB")})


def _shared(config: StudyConfig) -> Iterator[str]:
    """Which of stage one's chance is in the intervals, and which is not."""
    several = [name for name, what in config.encoders.items() if isinstance(what, tuple)]
    one = [name for name, what in config.encoders.items() if isinstance(what, str) and what != "random"]
    if one:
        yield f"Stage one of {', '.join(one)} is one run, shared by all seeds: the intervals hold label draw and head alone."
    if several:
        yield f"Of {', '.join(several)} each seed has a run of stage one of its own, so the intervals hold its chance too."


def initializations_of(words: Sequence[str]) -> list[str]:
    """The command's leading words that are no overrides, each an initialization by its folder's name; after ``--`` all are common.

    ``RUN seeds=3 -- data=folder`` is ``encoders.run="RUN" seeds=3 common=["data=folder"]``.
    """
    words = list(words)
    common = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    named = dict[str, str]()
    while words and not words[0].startswith("-") and ("=" not in words[0] or Path(words[0]).exists()):
        place = words.pop(0)
        path = Path(place)
        short, long = slug(path.name), slug(f"{path.parent.name}_{path.name}")
        names = [short, long, *(f"{short}_{number}" for number in range(2, len(named) + 3))]
        named[next(name for name in names if name not in named)] = place  # none takes another's place
    encoders = [f"encoders.{name}={quoted(place)}" for name, place in named.items()]
    return [*encoders, *words, *([f"common={listed(common)}"] if common else [])]


class StudyTable:
    """A study's rows (``init``, ``regime``, ``labels``, ``seed`` and ``figures`` each), by condition and label count."""

    def __init__(self, rows: Sequence[Row], config: StudyConfig, in_percent: bool) -> None:
        self.rows, self.config, self.in_percent = rows, config, in_percent
        self.figure = next(iter(rows[0]["figures"]))
        self.conditions: list[Condition] = list(dict.fromkeys((row["init"], row["regime"]) for row in rows))
        self.labels: list[int | str] = list(dict.fromkeys(row["labels"] for row in rows))

    def values(self, condition: Condition, labels: int | str) -> list[float]:
        found = [row for row in self.rows if (row["init"], row["regime"], row["labels"]) == (*condition, labels)]
        return [row["figures"][self.figure] for row in sorted(found, key=lambda row: row["seed"])]

    def count(self, labels: int | str) -> int:
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
        return value.percent(signed) if self.in_percent else value.plain(signed)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: a condition each, with all label counts, and below them the differences from the baseline."""
        rows = []
        for condition in self.conditions:
            values = [interval(self.values(condition, labels)) for labels in self.labels]
            rows.append([", ".join(condition), *map(self.format, values)])
        for condition in self.conditions:
            found = [self.against(condition, labels) for labels in self.labels]
            differences = [self.format(one, signed=True) for one in found if one is not None]
            if self.baseline is not None and differences:
                rows.append([f"{', '.join(condition)} − {', '.join(self.baseline)}", *differences])
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


def main() -> None:
    """The command line."""
    run_command("study", StudyConfig, study, initializations_of(sys.argv[1:]))
