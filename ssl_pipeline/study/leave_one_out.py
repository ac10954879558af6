"""Which method generalizes to a domain that was never seen? Each domain is left out once, and all others are the sources."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import run_command
from ssl_pipeline.config.values import listed
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.study.rows import Figures, RowsConfig, accuracies, against, cell_of, heading, write_domain_json


class LeaveOneOutConfig(RowsConfig):
    """What is compared. An encoder must not have seen the domain that is left out.

    Attributes:
        domains: two or more; each is left out once.
        methods: per row its own overrides, such as ``[domain=mixstyle]``. The step that is kept and every setting are chosen by
            labels held out of the sources (training-domain validation).
        seeds: repeats, paired.
    """

    domains: tuple[str, ...]
    methods: dict[str, list[str]] = Field(min_length=1)
    seeds: int = Field(3, ge=1)

    def overrides(self, method: str, left_out: str, seed: int) -> list[str]:
        sources = [name for name in self.domains if name != left_out]
        sides = [f"domain.source={listed(sources)}", f"domain.target={listed([left_out])}"]
        return [*self.start(seed=seed), *self.methods[method], *sides]


def study(config: LeaveOneOutConfig) -> Path:
    """Trains each method on all domains but one, for each of them, and measures it on that one; the worst beside the mean."""
    config.check_baseline(config.methods, "methods")
    if len(set(config.domains)) < max(2, len(config.domains)):
        raise ConfigError(
            f"`domains` is {', '.join(config.domains) or 'empty'}: name two or more different ones. With one left out, another "
            "must be there to learn from."
        )
    cells = [
        cell_of({"left_out": name, "method": method}, config.overrides(method, name, seed), seed)
        for name in config.domains for method in config.methods for seed in range(config.seeds)
    ]  # fmt: skip
    with config.measured("study-leave-one-out", cells) as (folder, by_domain, _):
        found = {method: {name: by_domain[name][method] for name in config.domains} for method in config.methods}
        title = f"accuracy (%) on the domain that was left out, {config.seeds} seed(s)"
        print_table(title, *tabulate(found, config.baseline))
        write_json(folder / "study.json", {"protocol": "leave one out", "figures": found})
        rows = [(method, "all others", name, seeds) for method, of in found.items() for name, seeds in of.items()]
        write_domain_json(folder, rows)
        console().print(f"wrote {folder / 'study.json'} and domain.json")
        return folder


def tabulate(cells: dict[str, dict[str, list[Figures]]], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy on each domain, their mean and the worst, and the mean's paired difference from the baseline."""
    domains = list(cells[baseline])
    means = {method: _over_domains(of, statistics.fmean) for method, of in cells.items()}
    differences, found = against(means, baseline)
    table = []
    for method, of in cells.items():
        each = [interval(accuracies(of[name])).percent() for name in domains]
        worst = interval(_over_domains(of, min)).percent()
        gain = [differences[method].percent(signed=True), found[method]] if method in differences else ["", ""]
        table.append([method, *each, interval(means[method]).percent(), worst, *gain])
    return ["method", *domains, "mean", "worst domain", f"mean against {baseline}", heading(len(found))], table


def _over_domains(of: dict[str, list[Figures]], fold: Callable[[list[float]], float]) -> list[float]:
    """Per seed the mean, or the least, of the domains' accuracies."""
    return [fold(list(seed)) for seed in zip(*map(accuracies, of.values()), strict=True)]


def main() -> None:
    """The command line."""
    run_command("study_leave_one_out", LeaveOneOutConfig, study)
