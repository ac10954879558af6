"""Which method helps across domains? Each on each shift with the same seeds, in one table that says where one hurts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.config.values import listed
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import open_run, write_json
from ssl_pipeline.metrics.interval import Interval, interval, paired_difference
from ssl_pipeline.study.cells import Cell, Opener, check_cells, slug
from ssl_pipeline.study.domain_map import draw, spots
from ssl_pipeline.study.jobs import train_cells
from ssl_pipeline.study.rows import (
    WORDS,
    Figures,
    RowsConfig,
    accuracies,
    against,
    cell_of,
    fill,
    heading,
    nested,
    write_domain_json,
)  # fmt: skip

_DISTANCE = "label_free/proxy_a_distance"
_BETTER_IS_SMALLER = ("entropy",)


@dataclass(frozen=True)
class Shift:
    """From the source to a target.

    Attributes:
        name: for people.
        target: the domain.
        methods: those that are compared on it.
        control: what stands for the target in training; see :class:`ssl_pipeline.domain.method.MethodConfig`.
    """

    name: str
    target: str
    methods: list[str]
    control: str | None = None


class DomainStudyConfig(RowsConfig):
    """What is compared; in overrides ``{source}`` and ``{target}`` stand for the shift's domains, and ``{seed}`` for the seed.

    Attributes:
        source: the domain with labels.
        targets: each is a shift of its own.
        methods: per row its own overrides; one without ``domain=`` is a bound that is no candidate for a choice.
        select: what chooses a row without the target's labels: its entropy, the density of its predictions (SND), or accuracy on
            labels held out of the source.
        negative_controls: also where nothing can be gained: without a shift (the target is other images of the source), and with noise or
            shuffled pixels in place of the target's training images.
        seeds: repeats, paired; stage one is shared unless ``{seed}`` stands in ``encoder``.
    """

    source: str
    targets: tuple[str, ...] = Field(min_length=1)
    methods: dict[str, list[str]] = Field(min_length=1)
    select: Literal["entropy", "snd", "source_validation"] = "snd"
    negative_controls: bool = False
    seeds: int = Field(3, ge=1)

    def shifts(self) -> list[Shift]:
        """What every method is measured on."""
        found = [Shift(target, target, list(self.methods)) for target in self.targets]
        if self.negative_controls:
            methods = [name for name in self.methods if self.is_candidate(name)]
            found.append(Shift("no shift", self.targets[0], methods, "no_shift"))
            found += [Shift(f"{target} as {control}", target, methods, control)
                      for target in self.targets for control in ("noise", "shuffled")]  # fmt: skip
        return found

    def overrides(self, method: str, shift: Shift, seed: int) -> list[str]:
        """Those of a row on a shift."""
        named: dict[str, object] = {"source": self.source, "target": shift.target, "seed": seed}
        own = [*self.start(**named), *fill(self.methods[method], **named)]
        sides = [f"domain.source={listed([self.source])}", f"domain.target={listed([shift.target])}"]
        control = [f"domain.negative_control={shift.control}"] if shift.control else []
        return [*own, *(sides if self.is_candidate(method) else []), *control]

    def is_candidate(self, method: str) -> bool:
        """Whether a row learns across domains, rather than from the target's labels."""
        return any(text.startswith("domain=") for text in self.methods[method])


def study(config: DomainStudyConfig) -> Path:
    """Compares methods across domains, and says which helped, which hurt, and which would have been chosen."""
    config.check_baseline(config.methods, "methods")
    if not config.is_candidate(config.baseline):
        raise ConfigError(
            f"`baseline` {config.baseline!r} has no `domain=`: take a row that learns without the target's labels."
        )
    cells = [
        cell_of({"shift": shift.name, "method": method}, config.overrides(method, shift, seed), seed)
        for shift in config.shifts() for method in shift.methods for seed in range(config.seeds)
    ]  # fmt: skip
    opener = Opener()
    check_cells(cells, opener)
    with open_run(config.output, "study-domain", config.resume, dump(config)) as run:
        first = [cell for cell in cells if cell.seed == 0]
        records, _ = train_cells(cells, run.path, opener, config.jobs, models=[cell.name for cell in first])
        found = nested(cells, records)
        for shift in config.shifts():
            title = f"{config.source} → {shift.name}: accuracy (%), {config.seeds} seed(s)"
            print_table(title, *tabulate(found[shift.name], config))
            if shift.control is None:
                _draw_map(config, run.path, shift, first, found[shift.name], opener)
        lines = sentences(found, config)
        console().print("\n".join(lines))
        write_domain_json(
            run.path, [(m, config.source, name, seeds) for name, rows in found.items() for m, seeds in rows.items()]
        )
        write_json(run.path / "study.json", {"select": config.select, "figures": found, "conclusion": lines})
        console().print(
            f"wrote {run.path / 'study.json'}, with all figures per domain and class; domain.json; and a map of each shift"
        )
        return run.path


def sentences(cells: dict[str, dict[str, list[Figures]]], config: DomainStudyConfig) -> list[str]:
    """On each shift which methods helped, hurt, or neither; of a control also whether it came out as it must."""
    lines = []
    for shift in config.shifts():
        rows = cells[shift.name]
        _, found_of = _compared(rows, config)
        groups = {word: [name for name, own in found_of.items() if own == word] for word in WORDS.values()}
        found = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names)
        kind = "" if shift.control is None else "control, "
        alarm = ""
        if shift.control is not None and groups["helps"]:
            alarm = ". No gain was to be had from the target there: this one is chance, or has another cause"
        lines.append(f"{kind}{config.source} → {shift.name}: {found or 'nothing was compared'}{alarm}.")
    return lines


def _compared(rows: dict[str, list[Figures]], config: DomainStudyConfig) -> tuple[dict[str, Interval], dict[str, str]]:
    """Each row's paired difference from the baseline, and verdicts of the candidates."""
    values = {name: accuracies(seeds) for name, seeds in rows.items()}
    return against(values, config.baseline, [name for name in rows if config.is_candidate(name)])


def _draw_map(
    config: DomainStudyConfig,
    folder: Path,
    shift: Shift,
    cells: list[Cell],
    rows: dict[str, list[Figures]],
    opener: Opener,
) -> None:
    """Saves the first seed's map of a shift: the baseline, which knew nothing of the target, and each method after it."""
    panels = {}
    own = [cell for cell in cells if cell.row["shift"] == shift.name and config.is_candidate(cell.row["method"])]
    for cell in sorted(own, key=lambda cell: cell.row["method"] != config.baseline):
        model, figures = folder / "models" / cell.condition, rows[cell.row["method"]][0]
        if not (model / "model.safetensors").is_file():
            console().print(f"no map of {config.source} → {shift.name}: {model} holds no model any more", markup=False)
            return
        distance = f", A-distance {figures[_DISTANCE]:.2f}" if _DISTANCE in figures else ""
        heading_of = f"{cell.row['method']}\n{100 * figures['accuracy']:.1f} %{distance}"
        panels[heading_of] = spots(model, opener.plan(cell.config)[1])
    if panels:
        file = folder / f"map_{slug(shift.name)}.png"
        draw(f"{config.source} → {shift.name}: held-out images, two principal components", panels, file)


def chosen(rows: dict[str, Figures], figure: str) -> str:
    """The row that a figure chooses; ``accuracy`` is the oracle's, who knows the target's labels.

    Raises:
        ConfigError: a row lacks the figure.
    """
    if any(figure not in figures for figures in rows.values()):
        raise ConfigError(
            f"`select`: not every row has {figure}: source_validation needs labels.validation above 0, such as 0.2."
        )
    sign = -1 if figure.rpartition("/")[2] in _BETTER_IS_SMALLER else 1
    return max(rows, key=lambda name: sign * rows[name][figure])


def tabulate(rows: dict[str, list[Figures]], config: DomainStudyConfig) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy, the paired difference from the baseline and what to make of it, and how often each was chosen.

    Verdicts are of the methods alone, corrected for their number; the bound and what was chosen are none of them.
    """
    base = [figures["accuracy"] for figures in rows[config.baseline]]
    differences, found_of = _compared(rows, config)
    figure = config.select if config.select == "source_validation" else f"label_free/{config.select}"
    picks, oracle = list[str](), list[str]()
    for seed in range(config.seeds):
        candidates = {name: cells[seed] for name, cells in rows.items() if config.is_candidate(name)}
        picks.append(chosen(candidates, figure))
        oracle.append(chosen(candidates, "accuracy"))
    table = []
    for name, cells in rows.items():
        values = [figures["accuracy"] for figures in cells]
        found = [differences[name].percent(signed=True) if name in differences else "", found_of.get(name, "")]
        counts = [str(names.count(name)) if config.is_candidate(name) else "" for names in (picks, oracle)]
        distances = [figures[_DISTANCE] for figures in cells if _DISTANCE in figures]
        apart = f"{interval(distances).mean:.2f}" if distances else ""
        table.append([name, interval(values).percent(), *found, apart, *counts])
    for label, names in ((f"chosen by {config.select}", picks), ("chosen by the oracle", oracle)):
        values = [rows[name][seed]["accuracy"] for seed, name in enumerate(names)]
        difference = paired_difference(values, base).percent(signed=True)
        table.append([label, interval(values).percent(), difference, "", "", "", ""])
    return [
        "method",
        "accuracy",
        f"against {config.baseline}",
        heading(len(found_of)),
        "A-distance",
        f"chosen by {config.select}",
        "by the oracle",
    ], table


def main() -> None:
    """The command line."""
    run_command("study_domain", DomainStudyConfig, study)


if __name__ == "__main__":
    main()
