"""What the studies across domains share: rows of overrides with the same seeds, and their differences from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import load
from ssl_pipeline.config.values import quoted
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.run import Resume, open_run, write_json
from ssl_pipeline.metrics.interval import Interval, Verdict, paired_difference, verdicts
from ssl_pipeline.study.cells import Cell, Opener, check_cells
from ssl_pipeline.study.jobs import train_cells

Figures = dict[str, float]
WORDS: dict[Verdict, str] = {
    "gain": "helps", "no difference": "no gain beyond chance", "loss": "hurts", "one seed": "one seed",
}  # fmt: skip


class RowsConfig(FrozenModel):
    """What a study of rows compares.

    Attributes:
        encoder: a stage-one run's folder, in which ``{seed}`` stands for the seed (``{split}`` in a study of unknown classes); null
            where ``common`` or the rows start from random weights.
        common: overrides of ``finetune.yaml`` for every row.
        baseline: the row that the others are compared with.
        jobs: processes at a time; null takes one for each GPU, or one of one thread for each core.
        output: the study's folder.
        resume: ``auto`` goes on with the study in ``output``: what it has measured is not measured again.
    """

    encoder: str | None = None
    common: tuple[str, ...] = ()
    baseline: str
    jobs: int | None = Field(1, ge=1)
    output: str | None = None
    resume: Resume = "no"

    def check_baseline(self, rows: Mapping[str, Any], kind: str) -> None:
        if self.baseline not in rows:
            raise ConfigError(f"`baseline` {self.baseline!r} is none of the {kind}: {', '.join(rows)}.")

    def start(self, **stands_for: object) -> list[str]:
        """The encoder and the common overrides, with what stands for names in braces."""
        words = [*([f"encoder={quoted(self.encoder)}"] if self.encoder else []), *self.common]
        return fill(words, **stands_for)

    @contextmanager
    def measured(
        self, stage: str, cells: Sequence[Cell], look: Callable[[Plan], None] | None = None, models: Sequence[Cell] = ()
    ) -> Iterator[tuple[Path, dict[str, Any], Opener]]:
        """Checks all cells, opens the study's folder and trains what is missing; ``models`` are the cells whose models are kept.

        Yields:
            The folder; the metrics of each seed in a list, below the values of the cells' rows in their order; and what has opened the
            cells' data.
        """
        opener = Opener()
        check_cells(cells, opener, look)
        with open_run(self.output, stage, self.resume, dump(self)) as run:
            records, _ = train_cells(cells, run.path, opener, self.jobs, [cell.name for cell in models])
            found: dict[str, Any] = {}
            for cell, record in zip(cells, records, strict=True):
                *outer, last = map(str, cell.row.values())
                place = found
                for key in outer:
                    place = place.setdefault(key, {})
                place.setdefault(last, []).append(record["figures"])
            yield run.path, found, opener


def fill(words: Sequence[str], **stands_for: object) -> list[str]:
    """Words with values in place of names in braces."""
    words = list(words)
    for name, value in stands_for.items():
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    return words


def cell_of(row: Mapping[str, Any], overrides: Sequence[str], seed: int) -> Cell:
    """The cell of a row's overrides of ``finetune.yaml``."""
    return Cell(row, seed, load("finetune", FinetuneConfig, [*overrides, f"seed={seed}", "seeds=1"]))


def against(
    values: Mapping[str, Sequence[float]], baseline: str, judged: Sequence[str] | None = None
) -> tuple[dict[str, Interval], dict[str, str]]:
    """Each row's difference from a row, paired by seed; and verdicts of those that are judged, corrected for their number."""
    differences = {name: paired_difference(own, values[baseline]) for name, own in values.items() if name != baseline}
    compared = [name for name in differences if judged is None or name in judged]
    found = verdicts([differences[name] for name in compared])
    return differences, {name: WORDS[one] for name, one in zip(compared, found, strict=True)}


def heading(comparisons: int) -> str:
    """Of a table's column of verdicts."""
    return f"verdict (Holm, {comparisons} comparison{'' if comparisons == 1 else 's'})" if comparisons else ""


def accuracies(seeds: Sequence[Figures]) -> list[float]:
    """Of each seed."""
    return [figures["accuracy"] for figures in seeds]


def write_domain_json(folder: Path, rows: Sequence[tuple[str, str, str, Sequence[Figures]]]) -> None:
    """Writes ``domain.json``, which the report shows: per row method, source, target, and the metrics of each seed."""
    found = [
        {"method": method, "source": source, "target": target, "seed": seed, "figures": figures}
        for method, source, target, seeds in rows
        for seed, figures in enumerate(seeds)
    ]
    write_json(folder / "domain.json", {"rows": found, "figure": "accuracy"})
