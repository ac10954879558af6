"""How well are images of unknown classes recognized? Over several draws of the known classes, with a control."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load, run_command
from ssl_pipeline.config.values import listed
from ssl_pipeline.domain.plan import DomainPlan
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.metrics.open_set import SCORES
from ssl_pipeline.rng import permutation
from ssl_pipeline.study.rows import Figures, RowsConfig, accuracies, against, cell_of, heading


class OpenSetConfig(RowsConfig):
    """What is compared; the baseline is the control: a row without what the others learned, such as a frozen random encoder.

    Attributes:
        source: the domain with labels.
        target: the domain whose known and unknown images are told apart; null stays in the source, with images held out of it.
        rows: by name their own overrides.
        known: how many classes are taught; the others are unknown.
        splits: draws of the known classes; each has label draw, head and order of its own too.
    """

    source: str
    target: str | None = None
    rows: dict[str, list[str]] = Field(min_length=1)
    known: int = Field(6, ge=2)
    splits: int = Field(5, ge=1)

    def overrides(self, row: str, known: list[str], split: int) -> list[str]:
        target = "domain.negative_control=no_shift" if self.target is None else f"domain.target={listed([self.target])}"
        sides = [f"domain.source={listed([self.source])}", target, f"domain.known={listed(known)}"]
        return [*self.start(split=split), *self.rows[row], *sides]


def known_classes(classes: tuple[str, ...], count: int, split: int) -> list[str]:
    """The classes that a split teaches, in the order of their numbers."""
    return [classes[c] for c in permutation(len(classes), "open set", split)[:count].sort().values.tolist()]


def study(config: OpenSetConfig) -> Path:
    """Teaches some classes, and measures how well images of the others are recognized, over draws of the known ones."""
    config.check_baseline(config.rows, "rows")
    pool = load("finetune", FinetuneConfig, config.common).data.open("train")
    classes = () if pool is None or pool.classes is None else pool.classes
    if config.known >= len(classes):
        raise ConfigError(
            f"`known` is {config.known}, and there are {len(classes)} classes: leave one or more unknown."
        )
    taught = [known_classes(classes, config.known, split) for split in range(config.splits)]
    cells = [
        cell_of({"row": row, "kind": "split"}, config.overrides(row, known, split), split)
        for row in config.rows for split, known in enumerate(taught)
    ]  # fmt: skip
    with config.measured("study-open-set", cells, _check_unknown) as (folder, by_row, _):
        found = {row: of["split"] for row, of in by_row.items()}
        place = config.source if config.target is None else f"{config.source} → {config.target}"
        title = f"{place}: {config.known} known of {len(classes)} classes, {config.splits} split(s)"
        print_table(title, *tabulate(found, config.baseline))
        write_json(folder / "study.json", {"known": taught, "figures": found})
        console().print(f"wrote {folder / 'study.json'}, with all figures per score")
        return folder


def _check_unknown(plan: Plan) -> None:
    if isinstance(plan, DomainPlan) and plan.domains.unknown is None:
        raise ConfigError(
            f"there is no image of an unknown class among the held-out ones of {', '.join(plan.domains.targets)}: all of them "
            f"are of {', '.join(plan.pool.classes or ())}."
        )


def tabulate(cells: dict[str, list[Figures]], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy on known images, each score's AUROC, and the best score's OSCR and difference from the control.

    The best score is the control's or the row's own by its mean AUROC: with unknown images, so it is an oracle's choice.
    """
    best = {row: max(SCORES, key=lambda score: interval(_auroc(found, score)).mean) for row, found in cells.items()}
    differences, found_of = against({row: _auroc(found, best[row]) for row, found in cells.items()}, baseline)
    table = []
    for row, found in cells.items():
        aurocs = [interval(_auroc(found, score)).plain() for score in SCORES]
        oscr = interval([figures[f"open/{best[row]}/oscr"] for figures in found])
        gain = [differences[row].plain(signed=True), found_of[row]] if row in differences else ["", ""]
        table.append([row, interval(accuracies(found)).percent(), *aurocs, best[row], oscr.plain(), *gain])
    scores = [f"AUROC {score}" for score in SCORES]
    columns = ["", "accuracy (%)", *scores, "best", "its OSCR", f"against {baseline}", heading(len(found_of))]
    return columns, table


def _auroc(found: list[Figures], score: str) -> list[float]:
    return [figures[f"open/{score}/auroc"] for figures in found]


def main() -> None:
    """The command line."""
    run_command("study_open_set", OpenSetConfig, study)
