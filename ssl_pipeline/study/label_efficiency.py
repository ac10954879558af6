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
from ssl_pipeline.downstream.selection import selection
from ssl_pipeline.logging.logger import open_loggers
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import RunFolder, open_run, versions, write_json
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.models.weights import is_file_name
from ssl_pipeline.study.cells import Cell, Opener, check_draws, check_starts, slug
from ssl_pipeline.study.grid import StudyConfig, cells
from ssl_pipeline.study.jobs import train_cells
from ssl_pipeline.study.table import StudyTable, draw_table

SCHEMA = 1


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
        all_cells, firsts = (
            [cell for of_init in grid.values() for cell in of_init],
            [of_init[0] for of_init in grid.values()],
        )
        _print_selection(config, all_cells, opener)
        models = [cell.name for cell in all_cells if config.models and cell.seed == firsts[0].seed]
        asks = [cell.name for cell in firsts if config.knn]
        rows, accuracies = train_cells(all_cells, run.path, opener, config.jobs, models, asks)
        knn = {cell.row["init"]: accuracies[cell.name] for cell in firsts if cell.name in accuracies}
        findings = _write(config, firsts[0], rows, left_out, knn, run.path)
        _track(config, findings, run)
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
    """Prints the table and writes ``study.json`` and the pictures."""
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
    return [
        *(f"encoders.{name}={quoted(place)}" for name, place in named.items()),
        *words,
        *([f"common={listed(common)}"] if common else []),
    ]


def main() -> None:
    """The command line."""
    run_command("study", StudyConfig, study, initializations_of(sys.argv[1:]))


if __name__ == "__main__":
    main()
