"""Which method helps across domains? Each on each shift with the same seeds, in one table that says where one hurts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import run_command
from ssl_pipeline.config.values import listed
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.plan import DomainPlan
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.evaluation.plots import pca_projection
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.interval import Interval, interval, paired_difference
from ssl_pipeline.study.cells import Cell, Opener, slug
from ssl_pipeline.study.rows import (
    WORDS,
    Figures,
    RowsConfig,
    accuracies,
    against,
    cell_of,
    fill,
    heading,
    write_domain_json,
)
from ssl_pipeline.transforms.preprocessing import Preprocessing

_MOST = 300  # points of a domain: more of them hide one another
# Okabe and Ito's two that differ most, also in their lightness.
_DOMAINS = ("#0072B2", "#E69F00")
_DISTANCE = "label_free/proxy_a_distance"
_BETTER_IS_SMALLER = ("entropy",)


@dataclass(frozen=True)
class Shift:
    """From the source to a target; ``control`` is what stands for it in training, a negative control of the method's config."""

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
        found = [Shift(target, target, list(self.methods)) for target in self.targets]
        if self.negative_controls:
            methods = [name for name in self.methods if self.is_candidate(name)]
            found.append(Shift("no shift", self.targets[0], methods, "no_shift"))
            found += [Shift(f"{target} as {control}", target, methods, control)
                      for target in self.targets for control in ("noise", "shuffled")]  # fmt: skip
        return found

    def overrides(self, method: str, shift: Shift, seed: int) -> list[str]:
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
    first = [cell for cell in cells if cell.seed == 0]
    with config.measured("study-domain", cells, models=first) as (folder, found, opener):
        for shift in config.shifts():
            title = f"{config.source} → {shift.name}: accuracy (%), {config.seeds} seed(s)"
            print_table(title, *tabulate(found[shift.name], config))
            if shift.control is None:
                _draw_map(config, folder, shift, first, found[shift.name], opener)
        lines = sentences(found, config)
        console().print("\n".join(lines))
        rows = [(method, config.source, name, seeds) for name, of in found.items() for method, seeds in of.items()]
        write_domain_json(folder, rows)
        write_json(folder / "study.json", {"select": config.select, "figures": found, "conclusion": lines})
        console().print(
            f"wrote {folder / 'study.json'}, with all figures per domain and class; domain.json; and a map of each shift"
        )
        return folder


def sentences(cells: dict[str, dict[str, list[Figures]]], config: DomainStudyConfig) -> list[str]:
    """On each shift which methods helped, hurt, or neither; of a control also whether it came out as it must."""
    lines = []
    for shift in config.shifts():
        rows = cells[shift.name]
        _, found_of = _compared(rows, config)
        groups = {word: [name for name, own in found_of.items() if own == word] for word in WORDS.values()}
        found = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names)
        kind = "" if shift.control is None else "control, "
        alarm = ". No gain was to be had from the target there: this one is chance, or has another cause"
        alarm = alarm if shift.control is not None and groups["helps"] else ""
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
    differences, found_of = _compared(rows, config)
    figure = config.select if config.select == "source_validation" else f"label_free/{config.select}"
    picks, oracle = list[str](), list[str]()
    for seed in range(config.seeds):
        candidates = {name: cells[seed] for name, cells in rows.items() if config.is_candidate(name)}
        picks.append(chosen(candidates, figure))
        oracle.append(chosen(candidates, "accuracy"))
    table = []
    for name, cells in rows.items():
        found = [differences[name].percent(signed=True) if name in differences else "", found_of.get(name, "")]
        counts = [str(names.count(name)) if config.is_candidate(name) else "" for names in (picks, oracle)]
        distances = [figures[_DISTANCE] for figures in cells if _DISTANCE in figures]
        apart = f"{interval(distances).mean:.2f}" if distances else ""
        table.append([name, interval(accuracies(cells)).percent(), *found, apart, *counts])
    for label, names in ((f"chosen by {config.select}", picks), ("chosen by the oracle", oracle)):
        values = [rows[name][seed]["accuracy"] for seed, name in enumerate(names)]
        difference = paired_difference(values, accuracies(rows[config.baseline])).percent(signed=True)
        table.append([label, interval(values).percent(), difference, "", "", "", ""])
    columns = ["method", "accuracy", f"against {config.baseline}", heading(len(found_of)), "A-distance"]
    return [*columns, f"chosen by {config.select}", "by the oracle"], table


@dataclass(frozen=True)
class EmbeddingPlot:
    """The images of a map: places (N, 2), domains (0 for the source, 1 for the target) and classes, int64 of shape (N,)."""

    plane: Tensor
    domain: Tensor
    label: Tensor
    classes: tuple[str, ...]


def spots(folder: Path, plan: Plan) -> EmbeddingPlot:
    """The held-out images of a plan across domains, in the plane of a model's features (two principal components)."""
    assert isinstance(plan, DomainPlan)
    model = load_model(folder)
    assert isinstance(model.task, Classification)
    blueprint, share = model.card.blueprint, DistInfo(0, 1, torch.device("cpu"))
    preprocessing = Preprocessing.of(blueprint)
    features, domains, labels = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, images in plan.domains.measured.items():
        index = torch.linspace(0, len(images) - 1, min(len(images), _MOST)).round().long()
        rows, read = extract_readable(model.task, images, preprocessing, share, index, model.task.neck_features)
        features.append(rows)
        domains.append(torch.full((len(read),), int(name in plan.domains.targets)))
        assert images.labels is not None
        labels.append(images.labels[read])
    plane, _ = pca_projection(torch.cat(features))
    return EmbeddingPlot(plane, torch.cat(domains), torch.cat(labels), model.classes)


def draw(title: str, panels: Mapping[str, EmbeddingPlot], file: Path) -> None:
    """Saves the picture: a column for each model, by its heading, colored by domain above and by class below."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(0.9 + 2.7 * len(panels), 6.6), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(2, len(panels), squeeze=False)
    classes = max((found.classes for found in panels.values()), key=len)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for (title_of, found), (above, below) in zip(panels.items(), axes.T, strict=True):
        # In no order of domains, so that neither lies on top of the other.
        order = torch.randperm(len(found.plane), generator=torch.Generator().manual_seed(0)).tolist()
        x, y = found.plane[order].T.tolist()
        domain, label = found.domain[order].tolist(), found.label[order].tolist()
        above.scatter(x, y, s=7, linewidths=0, alpha=0.7, c=[_DOMAINS[d] for d in domain])
        above.set_title(title_of, fontsize=9, parse_math=False)
        # The target's images are the ones to look at: the source's are small beside them.
        sizes = [12 if d else 4 for d in domain]
        below.scatter(x, y, s=sizes, linewidths=0, alpha=0.8, c=[palette[c % len(palette)] for c in label])
        for panel in (above, below):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_linewidth(0.4)
    axes[0, 0].set_ylabel("by domain")
    axes[1, 0].set_ylabel("by class (large: target)")
    for row, (colors, names) in enumerate(((_DOMAINS, ("source", "target")), (palette, classes))):
        style: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5}
        marks = [
            Line2D([], [], color=colors[n % len(colors)], label=name.replace("$", r"\$"), **style)
            for n, name in enumerate(names)
        ]
        axes[row, -1].legend(handles=marks, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    """The command line."""
    run_command("study_domain", DomainStudyConfig, study)
