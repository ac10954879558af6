"""``ssl-pipeline study RUN…``: did pretraining help? Initializations × regimes × label counts × seeds, in one table and picture.

Every cell of the grid is a file of its own, so that a study that was killed does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.config.values import listed, quoted
from ssl_pipeline.data.source import IndexedDataset
from ssl_pipeline.downstream.labels import draw, draw_index
from ssl_pipeline.downstream.selection import selection
from ssl_pipeline.finetune import check, starting_point
from ssl_pipeline.logging.logger import open_loggers
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.run import Run, open_run, versions, write_json
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.models.weights import is_file_name
from ssl_pipeline.study.cell import FeatureJob, TrainJob, reads_features
from ssl_pipeline.study.figure import draw as draw_figure
from ssl_pipeline.study.grid import Cell, StudyConfig, cells, changes, digest_of_weights, slug
from ssl_pipeline.study.jobs import num_jobs, run_jobs
from ssl_pipeline.study.verdict import StudyTable

SCHEMA = 1
_FEATURES_FORM = 2  # of the files of features: another number, and those of an older version are taken anew


def study(config: StudyConfig) -> Path:
    """Compares initializations, regimes and label counts of stage two, and says what pretraining bought."""
    grid = cells(config)
    pool, held_out = _open(grid)
    left_out = _check(grid, pool, held_out)
    for name, why in left_out.items():
        console().print(f"{name} is left out: {why}", markup=False)
    if left_out:  # fresh weights are of an architecture that is compared
        known = {name: what for name, what in config.initializations.items() if name not in left_out}
        if not set(known.values()) - {"random"}:
            raise ConfigError("none of the pretrained `initializations` can be had: give a run of stage one.")
        grid = cells(config.model_copy(update={"initializations": known}))
    facts = {name: _facts(of_init, pool, held_out) for name, of_init in grid.items()}
    settings = {"common": list(config.common), "overrides": dump(config)["overrides"]}
    with open_run(config.output, "study", "auto" if config.output else "no", settings) as run:
        for name in ("cells", "features", "models"):
            (run.path / name).mkdir(exist_ok=True)
        readings, trainings = _work(config, grid, facts, run.path, pool)
        total = sum(map(len, grid.values()))
        console().print(f"{total} cells, {total - len(trainings)} of them done before", markup=False)
        _tell_selection(config, grid, pool)
        _do(readings, config, len(readings))
        _do(trainings, config, total)
        rows = [
            json.loads(_file(run.path, cell).read_text(encoding="utf-8"))
            for of_init in grid.values()
            for cell in of_init
        ]
        knn = _knn(grid, facts, run.path) if config.knn else {}
        findings = _tell(config, grid, rows, left_out, knn, run.path)
        _track(config, findings, run)
        return run.path


def _open(grid: dict[str, list[Cell]]) -> tuple[IndexedDataset, IndexedDataset]:
    config = next(iter(grid.values()))[0].config
    pool, held_out = config.data.open("train"), config.data.open(config.split)
    assert pool is not None
    check(config, pool, held_out)
    assert held_out is not None
    return pool, held_out


def _check(grid: dict[str, list[Cell]], pool: IndexedDataset, held_out: IndexedDataset) -> dict[str, str]:
    """Looks at each initialization and draw before anything is written; returns those that are left out, and why.

    Official weights that can't be had (no network, most likely) are no reason to stop; what a person named wrongly is.
    """
    left_out = {}
    for name, of_init in grid.items():
        seen = set[str]()
        for cell in of_init:
            draw_index(cell.config.labels, cell.config.downstream, pool, cell.seed)
            key = f"{cell.regime} {cell.config.encoder}"
            if key in seen or name in left_out:
                continue
            seen.add(key)
            check(cell.config, pool, held_out)
            try:
                starting_point(cell.config, pool)
            except ConfigError as error:
                weights = cell.config.backbone.weights
                if cell.config.encoder is not None or weights is None or is_file_name(weights):
                    raise
                left_out[name] = str(error)
    return left_out


def _tell_selection(config: StudyConfig, grid: dict[str, list[Cell]], pool: IndexedDataset) -> None:
    """What `labels.validation=auto` comes to for each number of labels, in the regime that the summary speaks of."""
    for labels in config.labels:
        cells_of = [cell for of_init in grid.values() for cell in of_init if cell.labels == labels]
        cell = next((cell for cell in cells_of if cell.regime == config.trained_regime), cells_of[0])
        own = cell.config
        if own.labels.validation == "auto":
            drawn = draw(own.labels, own.downstream, pool, cell.seed)
            why = selection(own.labels, own.downstream, own.regime, drawn)["why"]
            console().print(f"  {labels} ({cell.regime}): {why}", markup=False)


def _facts(of_init: Sequence[Cell], pool: IndexedDataset, held_out: IndexedDataset) -> dict[str, Any]:
    """By an artifact's place, what decides a cell's figures beside its settings."""
    data = [pool.fingerprint(), held_out.fingerprint()]
    places = {str(cell.config.encoder): cell.config for cell in of_init}
    return {place: {"weights": digest_of_weights(config), "data": data} for place, config in places.items()}


def _work(
    config: StudyConfig, grid: dict[str, list[Cell]], facts: dict[str, Any], folder: Path, pool: IndexedDataset
) -> tuple[list[FeatureJob], list[TrainJob]]:
    """What is to be done; cells that are there are left alone if they were made by the same settings."""
    wanted, trainings = dict[Path, FeatureJob](), list[TrainJob]()
    problems = list[str]()
    for name, of_init in grid.items():
        for cell in of_init:
            own = {"settings": cell.settings, **facts[name][str(cell.config.encoder)]}
            file, features = _file(folder, cell), _features(folder, cell, own)
            knn = config.knn and cell.seed == of_init[0].seed and cell.regime == of_init[0].regime
            done = file.exists()
            if done:
                problems += _changed(file, own)
            if reads_features(cell.config) and (not done or knn):
                asked, index = knn and not features.with_suffix(".json").exists(), _drawn(cell, pool)
                before = wanted.get(features, FeatureJob(cell, index, False, features))
                index = torch.cat([before.index, index]).unique()
                wanted[features] = FeatureJob(before.cell, index, asked or before.knn, features)
            if not done:
                keep = config.models and cell.seed == of_init[0].seed
                model = folder / "models" / cell.name.rpartition("_")[0] if keep else None
                cached = features if reads_features(cell.config) else None
                trainings.append(TrainJob(cell, cached, file, own, model))
    if problems:
        raise ConfigError([
            *problems, f"{str(folder)!r} can only be completed as it was started: undo these, or choose another `output=FOLDER`.",
        ])  # fmt: skip
    # The longest first, so that at the end no process waits long for another.
    size = {labels: place for place, labels in enumerate(sorted(config.labels, key=_extent))}
    readings = [reading for reading in wanted.values() if reading.knn or not _holds(reading.file, reading.index)]
    return readings, sorted(trainings, key=lambda t: (-t.cell.config.regime.trains_all, -size[t.cell.labels]))


def _holds(features: Path, index: Tensor) -> bool:
    """Whether a file has the features of these training images: an earlier part of the study may have drawn fewer."""
    if not features.exists():
        return False
    with safe_open(features, "pt") as file:
        return bool(torch.isin(index, file.get_tensor("index")).all())


def _extent(labels: int | str) -> tuple[int, float]:
    if isinstance(labels, int):
        return (0, labels)
    return (1, 100.0 if labels == "all" else float(labels.removesuffix("%")))


def _drawn(cell: Cell, pool: IndexedDataset) -> Tensor:
    train, held_out = draw_index(cell.config.labels, cell.config.downstream, pool, cell.seed)
    return train if held_out is None else torch.cat([train, held_out]).sort().values


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _features(folder: Path, cell: Cell, own: dict[str, Any]) -> Path:
    """Where an encoder's features are; the name changes with all that decides them."""
    settings = own["settings"]
    parts = [
        _FEATURES_FORM,
        own["weights"],
        own["data"],
        *(settings[key] for key in ("size", "data", "split", "backbone", "neck", "views")),
    ]
    if cell.config.starts_fresh:
        parts.append(cell.seed)
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder / "features" / f"{slug(cell.init)}_{digest}.safetensors"


def _changed(file: Path, own: dict[str, Any]) -> list[str]:
    before = json.loads(file.read_text(encoding="utf-8"))
    told = changes({key: before.get(key) for key in own}, own)
    return [f"{file}: {text}" for text in told[:3]]


def _do(work: Sequence[FeatureJob | TrainJob], config: StudyConfig, total: int) -> None:
    processes = num_jobs(config.jobs, len(work))
    before = total - len(work)
    for place, text in enumerate(run_jobs(work, processes) if work else (), before + 1):
        console().print(f"  {place}/{total}  {text}", markup=False, highlight=False)


def _tell(
    config: StudyConfig, grid: dict[str, list[Cell]], rows: list[dict[str, Any]], left_out: dict[str, str],
    knn: dict[str, float], folder: Path,
) -> StudyTable:  # fmt: skip
    first = next(iter(grid.values()))[0].config
    findings = StudyTable(rows, config, first.downstream.in_percent)
    unit = " (%)" if findings.in_percent else ""
    print_table(f"{findings.figure}{unit} on {first.split}, {config.seeds} seed(s)", *findings.table())
    notes = list(_shared(config))
    if knn:
        told = ", ".join(f"{name} {100 * value:.1f} %" for name, value in knn.items())
        notes.insert(0, f"kNN (k = 20, all training labels): {told}.")
    sentences = findings.sentences()
    console().print("\n".join([*notes, *sentences]), markup=False, highlight=False)
    kept = ("init", "regime", "labels", "label_count", "held_out", "seed", "split", "figures", "seconds")
    base = findings.baseline
    record = {
        "schema_version": SCHEMA,
        "task": first.downstream.name,
        "figure": findings.figure,
        "in_percent": findings.in_percent,
        "split": first.split,
        "initializations": dump(config)["initializations"],
        "left_out": left_out,
        "baseline": None if base is None else {"init": base[0], "regime": base[1]},
        "claimed": config.trained_regime,
        "rows": [{key: row[key] for key in kept if key in row} for row in rows],
        "knn": knn,
        "notes": notes,
        "conclusion": sentences,
        "summary": sentences[-1],
        "versions": versions(),
    }
    write_json(folder / "study.json", record)
    draw_figure(findings, [folder / "study.png", folder / "study.svg"])
    console().print(f"wrote {folder / 'study.json'}, study.png and study.svg", markup=False)
    return findings


def _track(config: StudyConfig, findings: StudyTable, run: Run) -> None:
    """The study as one run of the mirrors: each condition's mean by label count, and the picture; nothing where there are none."""
    tracking = config.tracking
    if tracking.name == "off" and not tracking.mirrors:
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
    several = [name for name, what in config.initializations.items() if isinstance(what, tuple)]
    one = [name for name, what in config.initializations.items() if isinstance(what, str) and what != "random"]
    if one:
        yield f"Stage one of {', '.join(one)} is one run, shared by all seeds: the intervals hold label draw and head alone."
    if several:
        yield f"Of {', '.join(several)} each seed has a run of stage one of its own, so the intervals hold its chance too."


def _knn(grid: dict[str, list[Cell]], facts: dict[str, Any], folder: Path) -> dict[str, float]:
    """Of each initialization's first encoder, in the file that the study has for it."""
    found = {}
    for name, (first, *_) in grid.items():
        own = {"settings": first.settings, **facts[name][str(first.config.encoder)]}
        file = _features(folder, first, own).with_suffix(".json")
        if file.exists():
            found[name] = float(json.loads(file.read_text(encoding="utf-8"))["knn"])
    return found


def initializations_of(words: Sequence[str]) -> list[str]:
    """The command's leading words that are no overrides, each an initialization by its folder's name; after ``--`` all are common.

    ``RUN seeds=3 -- data=folder`` is ``initializations.run="RUN" seeds=3 common=["data=folder"]``.
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
        *(f"initializations.{name}={quoted(place)}" for name, place in named.items()),
        *words,
        *([f"common={listed(common)}"] if common else []),
    ]


def main() -> None:
    """The command line."""
    run_command("study", StudyConfig, study, initializations_of(sys.argv[1:]))


if __name__ == "__main__":
    main()
