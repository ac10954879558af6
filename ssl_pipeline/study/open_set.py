"""How well are classes that were never taught told from known ones? Over several draws of the known classes, with a control."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import load, run_command
from ssl_pipeline.config.values import listed, quoted
from ssl_pipeline.domain.open_set import SCORES
from ssl_pipeline.finetune import FinetuneConfig
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import Resume, open_run, write_json
from ssl_pipeline.metrics.interval import Interval, interval, paired_difference
from ssl_pipeline.rng import permutation
from ssl_pipeline.study.trained import Figures, check_places, checked, heading, trained, verdicts


class OpenSetConfig(FrozenModel):
    """What is compared.

    Attributes:
        encoder: a stage-one run's folder, in which ``{split}`` stands for the split; null where rows start from random weights.
        common: overrides of ``finetune.yaml`` for every row.
        source: the domain with labels.
        target: the domain whose known and unknown images are told apart; null stays in the source, with images held out of it.
        rows: by name their own overrides.
        baseline: the control: a row without what the others learned, such as a frozen encoder of random weights.
        known: how many classes are taught; the others are unknown.
        splits: draws of the known classes; each has label draw, head and order of its own too.
        output: the study's folder.
        resume: ``auto`` goes on with the study in ``output``: what it has measured is not measured again.
    """

    encoder: str | None = None
    common: tuple[str, ...] = ()
    source: str
    target: str | None = None
    rows: dict[str, list[str]] = Field(min_length=1)
    baseline: str
    known: int = Field(6, ge=2)
    splits: int = Field(5, ge=1)
    output: str | None = None
    resume: Resume = "no"

    def overrides(self, row: str, known: list[str], split: int) -> list[str]:
        """Those of a row on a split."""
        encoder = [f"encoder={quoted(self.encoder)}".replace("{split}", str(split))] if self.encoder else []
        target = "domain.control=no_shift" if self.target is None else f"domain.target={listed([self.target])}"
        sides = [f"domain.source={listed([self.source])}", target, f"domain.known={listed(known)}"]
        return [*encoder, *self.common, *self.rows[row], *sides]


def known_classes(classes: tuple[str, ...], count: int, split: int) -> list[str]:
    """The classes that a split teaches, in the order of their numbers."""
    return [classes[c] for c in permutation(len(classes), "open set", split)[:count].sort().values.tolist()]


def study(config: OpenSetConfig) -> Path:
    """Teaches some classes, and measures how well images of the others are found, over draws of the known ones."""
    if config.baseline not in config.rows:
        raise ConfigError(f"`baseline` {config.baseline!r} is none of the rows: {', '.join(config.rows)}.")
    pool = load("finetune", FinetuneConfig, config.common).data.open("train")
    classes = () if pool is None or pool.classes is None else pool.classes
    if config.known >= len(classes):
        raise ConfigError(
            f"`known` is {config.known}, and there are {len(classes)} classes: leave one or more unknown."
        )
    taught = [known_classes(classes, config.known, split) for split in range(config.splits)]
    check_places([row, "split"] for row in config.rows)
    for row in config.rows:  # all of them before the first trains
        for split, known in enumerate(taught):
            checked(config.overrides(row, known, split), with_unknown=True)
    with open_run(config.output, "study-open-set", config.resume, dump(config)) as run:
        cells = {
            row: [trained(run.path, [row, "split"], config.overrides(row, taught[split], split), split)
                  for split in range(config.splits)] for row in config.rows
        }  # fmt: skip
        place = config.source if config.target is None else f"{config.source} → {config.target}"
        title = f"{place}: {config.known} known of {len(classes)} classes, {config.splits} split(s)"
        print_table(title, *tabulate(cells, config.baseline))
        write_json(run.path / "study.json", {"known": taught, "figures": cells})
        console().print(f"wrote {run.path / 'study.json'}, with all figures per score")
        return run.path


def tabulate(cells: dict[str, list[Figures]], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy on known images, each score's AUROC, and the best score's OSCR and difference from the control.

    The best score is the control's or the row's own by its mean AUROC: with unknown images, so it is an oracle's choice.
    """
    best = {row: max(SCORES, key=lambda score: interval(_auroc(found, score)).mean) for row, found in cells.items()}
    control = _auroc(cells[baseline], best[baseline])
    differences = {r: paired_difference(_auroc(f, best[r]), control) for r, f in cells.items() if r != baseline}
    found_of = dict(zip(differences, verdicts(list(differences.values())), strict=True))
    table = []
    for row, found in cells.items():
        aurocs = [_told(interval(_auroc(found, score))) for score in SCORES]
        oscr = interval([figures[f"open/{best[row]}/oscr"] for figures in found])
        against = [_told(differences[row], signed=True), found_of[row]] if row in differences else ["", ""]
        accuracy = interval([figures["accuracy"] for figures in found]).percent()
        table.append([row, accuracy, *aurocs, best[row], _told(oscr), *against])
    columns = [
        "",
        "accuracy (%)",
        *(f"AUROC {score}" for score in SCORES),
        "best",
        "its OSCR",
        f"against {baseline}",
        heading(len(found_of)),
    ]
    return columns, table


def _auroc(found: list[Figures], score: str) -> list[float]:
    return [figures[f"open/{score}/auroc"] for figures in found]


def _told(value: Interval, signed: bool = False) -> str:
    mean = f"{value.mean:+.3f}" if signed else f"{value.mean:.3f}"
    return mean if value.half == float("inf") else f"{mean} ± {value.half:.3f}"


def main() -> None:
    """The command line."""
    run_command("study_open_set", OpenSetConfig, study)


if __name__ == "__main__":
    main()
