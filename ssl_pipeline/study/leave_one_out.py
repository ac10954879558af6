"""Which method generalizes to a domain that was never seen? Each domain is left out once, and all others are the sources."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.config.values import listed, quoted
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import Resume, open_run, write_json
from ssl_pipeline.metrics.interval import interval, paired_difference
from ssl_pipeline.study.trained import Figures, check_places, checked, heading, trained, verdicts, write_domain_json

Cells = dict[str, dict[str, list[Figures]]]


class LeaveOneOutConfig(FrozenModel):
    """What is compared.

    Attributes:
        encoder: a stage-one run's folder, in which ``{seed}`` stands for the seed; null where ``common`` starts from random
            weights. It must not have seen the domain that is left out, so it is of other images, or of none of these domains.
        common: overrides of ``finetune.yaml`` for every row.
        domains: two or more; each is left out once.
        methods: per row its own overrides, such as ``[domain=mixstyle]``. The step that is kept and every setting are chosen by
            labels held out of the sources (training-domain validation).
        baseline: the row that the others are compared with.
        seeds: repeats, paired.
        output: the study's folder.
        resume: ``auto`` goes on with the study in ``output``: what it has measured is not measured again.
    """

    encoder: str | None = None
    common: tuple[str, ...] = ()
    domains: tuple[str, ...]
    methods: dict[str, list[str]] = Field(min_length=1)
    baseline: str
    seeds: int = Field(3, ge=1)
    output: str | None = None
    resume: Resume = "no"

    def overrides(self, method: str, left_out: str, seed: int) -> list[str]:
        """Those of a row that has never seen a domain."""
        sources = [name for name in self.domains if name != left_out]
        encoder = [f"encoder={quoted(self.encoder)}".replace("{seed}", str(seed))] if self.encoder else []
        sides = [f"domain.source={listed(sources)}", f"domain.target={listed([left_out])}"]
        return [*encoder, *self.common, *self.methods[method], *sides]


def study(config: LeaveOneOutConfig) -> Path:
    """Trains each method on all domains but one, for each of them, and measures it on that one; the worst beside the mean."""
    if config.baseline not in config.methods:
        raise ConfigError(f"`baseline` {config.baseline!r} is none of the methods: {', '.join(config.methods)}.")
    if len(set(config.domains)) < max(2, len(config.domains)):
        raise ConfigError(
            f"`domains` is {', '.join(config.domains) or 'empty'}: name two or more different ones. With one left out, another "
            "must be there to learn from."
        )
    check_places([name, method] for name in config.domains for method in config.methods)
    for left_out in config.domains:
        for method in config.methods:  # all of them before the first trains
            for seed in range(config.seeds):
                checked(config.overrides(method, left_out, seed))
    with open_run(config.output, "study-leave-one-out", config.resume, dump(config)) as run:
        cells: Cells = {
            method: {name: [trained(run.path, [name, method], config.overrides(method, name, seed), seed)
                            for seed in range(config.seeds)] for name in config.domains}
            for method in config.methods
        }  # fmt: skip
        title = f"accuracy (%) on the domain that was left out, {config.seeds} seed(s)"
        print_table(title, *tabulate(cells, config.baseline))
        write_json(run.path / "study.json", {"protocol": "leave one out", "figures": cells})
        rows = [(method, "all others", name, found) for method, of in cells.items() for name, found in of.items()]
        write_domain_json(run.path, rows)
        console().print(f"wrote {run.path / 'study.json'} and domain.json")
        return run.path


def tabulate(cells: Cells, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy on each domain, their mean and the worst, and the mean's paired difference from the baseline."""
    domains = list(cells[baseline])
    means = {method: _over_domains(of, statistics.fmean) for method, of in cells.items()}
    differences = {m: paired_difference(values, means[baseline]) for m, values in means.items() if m != baseline}
    found_of = dict(zip(differences, verdicts(list(differences.values())), strict=True))
    table = []
    for method, of in cells.items():
        each = [interval([figures["accuracy"] for figures in of[name]]).percent() for name in domains]
        worst = interval(_over_domains(of, min)).percent()
        found = [differences[method].percent(signed=True), found_of[method]] if method in differences else ["", ""]
        table.append([method, *each, interval(means[method]).percent(), worst, *found])
    return ["method", *domains, "mean", "worst domain", f"mean against {baseline}", heading(len(found_of))], table


def _over_domains(of: dict[str, list[Figures]], fold: Callable[[list[float]], float]) -> list[float]:
    """Per seed the mean, or the least, of the domains' accuracies."""
    return [fold([figures["accuracy"] for figures in seed]) for seed in zip(*of.values(), strict=True)]


def main() -> None:
    """The command line."""
    run_command("study_leave_one_out", LeaveOneOutConfig, study)


if __name__ == "__main__":
    main()
