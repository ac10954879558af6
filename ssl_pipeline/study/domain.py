"""Which method helps across domains? Each on each shift with the same seeds, in one table that says where one hurts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, Strict, dump
from ssl_pipeline.config.command import load, run_command
from ssl_pipeline.evaluate.interval import interval, paired_difference
from ssl_pipeline.finetune import FinetuneConfig, finetune
from ssl_pipeline.track.progress import console, print_table
from ssl_pipeline.track.run import open_run, write_text_atomic

Figures = dict[str, float]
_BETTER_IS_SMALLER = ("entropy",)


class DomainStudyConfig(Strict):
    """What is compared.

    Attributes:
        encoder: a stage-one run's folder; null where ``common`` starts from random weights.
        common: overrides of ``finetune.yaml`` for every row; ``{source}`` and ``{target}`` stand for the shift's domains.
        source: the domain with labels.
        targets: each is a shift of its own.
        methods: per row its own overrides; one without ``domain=`` is a bound that is no candidate for a choice.
        baseline: the row that the others are compared with.
        select: what chooses a row without the target's labels: its entropy, the density of its predictions (SND), or accuracy on
            labels held out of the source.
        seeds: repeats, paired; stage one is shared.
        output: the study's folder.
        resume: ``auto`` goes on with the study in ``output``: what it has measured is not measured again.
    """

    encoder: str | None = None
    common: tuple[str, ...] = ()
    source: str
    targets: tuple[str, ...] = Field(min_length=1)
    methods: dict[str, list[str]] = Field(min_length=1)
    baseline: str
    select: Literal["entropy", "snd", "source_validation"] = "snd"
    seeds: int = Field(3, ge=1)
    output: str | None = None
    resume: Literal["no", "auto"] = "no"

    def overrides(self, method: str, target: str) -> list[str]:
        """Those of a row on a shift."""
        own = [text.replace("{source}", self.source).replace("{target}", target)
               for text in (*self.common, *self.methods[method])]  # fmt: skip
        sides = [f"domain.source=[{self.source}]", f"domain.target=[{target}]"] if self.is_candidate(method) else []
        return [*([f"encoder={self.encoder}"] if self.encoder else []), *own, *sides]

    def is_candidate(self, method: str) -> bool:
        """Whether a row learns across domains, rather than from the target's labels."""
        return any(text.startswith("domain=") for text in self.methods[method])


def study(config: DomainStudyConfig) -> Path:
    """Compares methods across domains, and says which helped, which hurt, and which would have been chosen."""
    if config.baseline not in config.methods:
        raise ConfigError(f"`baseline` {config.baseline!r} is none of the methods: {', '.join(config.methods)}.")
    for target in config.targets:
        for method in config.methods:  # all of them before the first trains
            load("finetune", FinetuneConfig, config.overrides(method, target))
    with open_run(config.output, "study-domain", config.resume, dump(config)) as run:
        cells = {
            target: {method: [_cell(config, run.path / "cells", method, target, seed) for seed in range(config.seeds)]
                     for method in config.methods}
            for target in config.targets
        }  # fmt: skip
        for target in config.targets:
            title = f"{config.source} → {target}: accuracy (%), {config.seeds} seed(s)"
            print_table(title, *tabulate(cells[target], config))
        write_text_atomic(run.path / "study.json", json.dumps({"select": config.select, "figures": cells}, indent=1))
        console().print(f"wrote {run.path / 'study.json'}, with all figures per domain and class")
        return run.path


def _cell(config: DomainStudyConfig, folder: Path, method: str, target: str, seed: int) -> Figures:
    """One training's figures; read where they are there, else measured and written."""
    name = re.sub(r"[^a-z0-9]+", "_", f"{target} {method} {seed}".lower())
    record = folder / f"{name}.json"
    if record.is_file():
        found: Figures = json.loads(record.read_text())
        return found
    shutil.rmtree(folder / name, ignore_errors=True)  # of a study that was stopped in this cell
    wanted = [*config.overrides(method, target), f"seed={seed}", "seeds=1", f"output={folder / name}"]
    figures = finetune(load("finetune", FinetuneConfig, wanted)).figures[0]
    write_text_atomic(record, json.dumps(figures, indent=1))
    console().print(f"  {config.source} → {target}, {method}, seed {seed}: {100 * figures['accuracy']:.1f} %")
    return figures


def chosen(rows: dict[str, Figures], figure: str) -> str:
    """The row that a figure chooses; ``accuracy`` is the oracle's, who knows the target's labels.

    Raises:
        ConfigError: a row lacks the figure.
    """
    if any(figure not in figures for figures in rows.values()):
        raise ConfigError(f"`select`: not every row has {figure}: source_validation needs labels.validation above 0.")
    sign = -1 if figure.rpartition("/")[2] in _BETTER_IS_SMALLER else 1
    return max(rows, key=lambda name: sign * rows[name][figure])


def tabulate(rows: dict[str, list[Figures]], config: DomainStudyConfig) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy, the paired difference from the baseline and what to make of it, and how often each was chosen."""
    base = [figures["accuracy"] for figures in rows[config.baseline]]
    figure = config.select if config.select == "source_validation" else f"label_free/{config.select}"
    picks, oracle = list[str](), list[str]()
    for seed in range(config.seeds):
        candidates = {name: cells[seed] for name, cells in rows.items() if config.is_candidate(name)}
        picks.append(chosen(candidates, figure))
        oracle.append(chosen(candidates, "accuracy"))
    table = []
    for name, cells in rows.items():
        values = [figures["accuracy"] for figures in cells]
        found = ["", ""] if name == config.baseline else _against(values, base)
        counts = [str(names.count(name)) if config.is_candidate(name) else "" for names in (picks, oracle)]
        table.append([name, interval(values).percent(), *found, *counts])
    for label, names in ((f"chosen by {config.select}", picks), ("chosen by the oracle", oracle)):
        values = [rows[name][seed]["accuracy"] for seed, name in enumerate(names)]
        table.append([label, interval(values).percent(), *_against(values, base), "", ""])
    return [
        "method",
        "accuracy",
        f"against {config.baseline}",
        "",
        f"chosen by {config.select}",
        "by the oracle",
    ], table


def _against(values: list[float], base: list[float]) -> list[str]:
    difference = paired_difference(values, base)
    verdict = "no gain beyond chance"
    if difference.half == float("inf"):
        verdict = "one seed"
    elif difference.low > 0:
        verdict = "helps"
    elif difference.mean + difference.half < 0:
        verdict = "hurts"
    return [difference.percent(signed=True), verdict]


def main() -> None:
    """The command line."""
    run_command("study_domain", DomainStudyConfig, study)


if __name__ == "__main__":
    main()
