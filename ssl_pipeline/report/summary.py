"""What runs found, in sentences: one run, or conditions that were measured with the same seeds."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.interval import Interval, interval, paired_difference
from ssl_pipeline.report.charts import first_and_last, last
from ssl_pipeline.report.read import RunRecord, measured_rows
from ssl_pipeline.report.tables import (
    ABSENT,
    Table,
    condition,
    duration,
    labels_in_words,
    shown,
    spoken,
    title_of,
)

_MOST_NAMES = 3


@dataclass(frozen=True)
class Comparison:
    """Values by condition and seed.

    Attributes:
        title: what was measured.
        values: per condition its metric at each seed.
        against: per condition the one that it is compared with, over the seeds that both have.
        baseline: what the conditions are compared with, for people.
        percent: whether the metric is a share.
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

    def gain(self, difference: Interval) -> str:
        """A difference for people."""
        return shown(difference, self.percent, signed=True) + (" points" if self.percent else "")

    def headline(self) -> tuple[str, Interval] | None:
        """The first claimed condition that is compared, or the first one of all; None where nothing is compared.

        The one that gained most would be chosen by the very numbers that are then reported.
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
    several = len(counts) > 1
    base = run.study.get("baseline")
    base = base if isinstance(base, dict) else {}
    values: dict[str, dict[int, float]] = {}
    against, claimed = dict[str, str](), list[str]()
    for row, value in rows:
        name = condition(row, with_labels=several)
        of_name = values.setdefault(name, {})
        seed = row.get("seed")
        of_name[seed if isinstance(seed, int) else len(of_name)] = value
        against[name] = condition({**row, **base}, with_labels=several)
        if row.get("regime") == run.study.get("reported_regime"):
            claimed.append(name)
    against = {name: other for name, other in against.items() if other in values and other != name}
    percent = run.study.get("in_percent")
    figure = str(run.study.get("figure", next(iter(rows[0][0]["figures"]))))
    split = f" on {run.study['split']}" if "split" in run.study else ""
    labels = f", {labels_in_words(counts[0])}" if not several and counts[0] is not None else ""
    percent = percent if isinstance(percent, bool) else all(0 <= value <= 1 for _, value in rows)
    title = f"{run.name}: {spoken(figure)}{' (%)' if percent else ''}{split}{labels}"
    baseline = condition(base, with_labels=False) if against else ""
    return Comparison(title, values, against, baseline, percent, tuple(claimed))


def runs_comparison(runs: Sequence[RunRecord]) -> Comparison | None:
    """Several stage-two runs as conditions, the first one the baseline; None unless two or more share their first metric."""
    measured = [run for run in runs if run.stage == "finetune" and run.seeds]
    if len(measured) < 2:
        return None
    name, first = next(iter(measured[0].seeds[0])), measured[0].name
    values = {
        run.name: {seed: row[name] for seed, row in enumerate(run.seeds, run.first_seed) if name in row}
        for run in measured
    }
    if not all(values.values()):
        return None
    percent = all(run.in_percent for run in measured)
    title = f"Runs compared: {spoken(name)}{' (%)' if percent else ''}"
    return Comparison(title, values, {run.name: first for run in measured[1:]}, first, percent)


def summary(run: RunRecord) -> list[str]:
    """The sentences of one run."""
    found = {"pretrain": _pretrain, "finetune": _finetune, "study": _study}[run.stage](run)
    return [sentence for sentence in found if sentence]


def _pretrain(run: RunRecord) -> list[str]:
    backbone, data = run.named("backbone"), run.named("data")
    what = f"{_pretext(run)} {'trains' if run.state == 'running' else 'trained'} {backbone or 'a backbone'}"
    how_long = f" for {run.steps:,} steps" if run.steps else ""
    took = f" in {duration(run.seconds)}" if run.seconds and run.state != "running" else ""
    so_far = {"finished": "", "running": " so far", "stopped": ", and was stopped before its end"}[run.state]
    return [f"{what} on {data or 'images'}{how_long}{took}{so_far}.", _knn(run), _collapse(run)]


def _pretext(run: RunRecord) -> str:
    """The pretext task as the field writes it: its module's first words."""
    name = run.named("pretext")
    try:
        doc = importlib.import_module(name if "." in name else f"ssl_pipeline.pretext.{name or '_'}").__doc__ or ""
    except ImportError:
        doc = ""
    return doc.partition(":")[0] if ":" in doc else name or "Pretraining"


def _knn(run: RunRecord) -> str:
    measured = first_and_last(run, "knn")
    if measured is None:
        return "Without labels there is no kNN accuracy." if last(run, "feature_std") is not None else ""
    before, after = (100 * value for value in measured)
    if abs(after - before) <= 0.05:
        return f"kNN accuracy on val stayed at {after:.1f} %."
    return f"kNN accuracy on val {'rose' if after > before else 'fell'} from {before:.1f} % untrained to {after:.1f} %."


def _collapse(run: RunRecord) -> str:
    std, rank = last(run, "feature_std"), last(run, "effective_rank")
    if std is None or rank is None:
        return ""
    problem = collapse.verdict({"feature_std": std, "effective_rank": rank}, width=None)
    return problem or f"The features did not collapse: std {std:.2f}, effective rank {rank:.0f}."


def _finetune(run: RunRecord) -> list[str]:
    name, rows = title_of(run), run.seeds
    fresh = run.config.get("init") == "random" or run.named("regime") == "scratch"
    start = f"{name[:1].upper()}{name[1:]} from {'random' if fresh else 'pretrained'} weights"
    found = first_metric(run)
    if found is None:
        return [f"{start}: nothing is measured yet."]
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else "one seed, which says nothing of chance"
    return [f"{start}: {found[0]} on {run.results.get('split', 'the held-out split')} {found[1]} over {seeds}."]


def first_metric(run: RunRecord) -> tuple[str, str] | None:
    """The name of a stage-two run's first metric, and its mean with the interval; None where nothing is measured."""
    if not run.seeds:
        return None
    name, percent = next(iter(run.seeds[0])), run.in_percent
    value = shown(interval([row[name] for row in run.seeds if name in row]), percent)
    return spoken(name), value + (" %" if percent else "")


def _study(run: RunRecord) -> list[str]:
    left_out = run.study.get("left_out")
    missing = [f"{name} was left out: {why}" for name, why in left_out.items()] if isinstance(left_out, dict) else []
    written = run.study.get("conclusion")
    if isinstance(written, list) and written:
        return [*map(str, written), *missing]
    found = study_comparison(run)
    if found is None:
        return ["Its figures are in its own table, study.json." if run.study else "The study has measured nothing yet."]
    headline = found.headline()
    if headline is None:
        return [f"{len(found.values)} condition(s) are measured so far.", *missing]
    name, difference = headline
    word = difference.verdict()
    meaning = f"(95 % interval, paired by seed): {'no gain beyond chance' if word == 'no difference' else f'a {word}'}."
    if word == "one seed":
        meaning = "with one seed, which says nothing of chance."
    return [f"{name} against {found.baseline}: {found.gain(difference)} {meaning}", *missing]


def title(runs: Sequence[RunRecord]) -> str:
    """The names of a few runs; of more the name of the folder that holds them all."""
    if len(runs) <= _MOST_NAMES:
        return ", ".join(run.name for run in runs)
    folder = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    return folder.name or f"{len(runs)} runs"


def overview(runs: Sequence[RunRecord]) -> Table | None:
    """A line a run: what it is, whether it is done, and its first metric; None for a few, which have sentences."""
    if len(runs) <= _MOST_NAMES:
        return None
    rows = []
    for run in runs:
        steps = f"{run.steps:,}" if run.steps and run.stage == "pretrain" else ABSENT
        rows.append([run.name, run.stage, run.state, steps, duration(run.seconds), *_figure(run)])
    return Table(f"{len(runs)} runs", ["run", "stage", "state", "steps", "time", "metric", "value"], rows)


def _figure(run: RunRecord) -> tuple[str, str]:
    """The name and value of what a reader looks for first in a run of its stage."""
    if run.stage == "pretrain" and (knn := first_and_last(run, "knn")):
        return "kNN on val, untrained → now", f"{100 * knn[0]:.1f} → {100 * knn[1]:.1f} %"
    if run.stage == "finetune" and (first := first_metric(run)):
        return first
    if run.stage == "study" and (found := study_comparison(run)) and (headline := found.headline()):
        return f"{headline[0]} against {found.baseline}", found.gain(headline[1])
    return ABSENT, ABSENT


def glance(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The numbers that a reader looks for first, of a single stage-one run and what followed it."""
    stage_one = [run for run in runs if run.stage == "pretrain"]
    if len(stage_one) != 1:
        return []
    run, items = stage_one[0], list[tuple[str, str, str]]()
    if knn := first_and_last(run, "knn"):
        items.append(("kNN on val", f"{100 * knn[1]:.1f} %", f"{100 * (knn[1] - knn[0]):+.1f} points over untrained"))
    for other in runs:
        found = study_comparison(other) if other.stage == "study" else None
        if found and (headline := found.headline()):
            gain = shown(headline[1], found.percent, signed=True)
            value = shown(found.mean(headline[0]), found.percent) + (" %" if found.percent else "")
            items.append(("Stage two", value, f"{headline[0]}: {gain} against {found.baseline}"))
        elif other.stage == "finetune" and (first := first_metric(other)):
            items.append(("Stage two", first[1], f"{first[0]}, {title_of(other)}"))
    if rank := last(run, "effective_rank"):
        items.append(("Effective rank", f"{rank:.0f}", f"feature std {last(run, 'feature_std') or 0:.2f}"))
    if loss := last(run, "loss", step_only=True):
        items.append(("Loss", f"{loss:.3g}", ""))
    if run.seconds:
        speed = last(run, "images_per_s")
        items.append(("Time", duration(run.seconds), f"{speed:,.0f} images/s" if speed else ""))
    return [{"name": name, "value": value, "note": note} for name, value, note in items]
