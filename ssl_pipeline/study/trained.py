"""One training of a study across domains: measured once, and read where it has been."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.evaluate.interval import Interval, paired_difference
from ssl_pipeline.finetune import FinetuneConfig, finetune
from ssl_pipeline.track.progress import console
from ssl_pipeline.track.run import write_text_atomic

Figures = dict[str, float]
VERDICTS = ("helps", "no gain beyond chance", "hurts", "one seed")


def place_of(folder: Path, words: Sequence[object]) -> Path:
    """The run's folder of a training; its figures are beside it, with the ending ``.json``."""
    return folder / "cells" / re.sub(r"[^a-z0-9]+", "_", " ".join(map(str, words)).lower())


def checked(overrides: Sequence[str]) -> FinetuneConfig:
    """A row's configuration.

    Raises:
        ConfigError: it can't be read, or starts from an encoder that nobody gave.
    """
    config = load("finetune", FinetuneConfig, overrides)
    if config.encoder is None and config.backbone.weights is None and not config.starts_fresh:
        raise ConfigError(
            f"`encoder` is required: a row is of regime {config.regime.name}, which starts from pretrained weights. Give the folder "
            "of a stage-one run."
        )
    return config


def trained(folder: Path, words: Sequence[object], overrides: Sequence[str], seed: int) -> Figures:
    """A training's figures; read where they are there, else measured and written.

    Args:
        folder: the study's.
        words: what tells the training from the study's others.
        overrides: of ``finetune.yaml``.
        seed: of label draw, head, order and views.
    """
    place = place_of(folder, [*words, seed])
    record = place.with_name(f"{place.name}.json")
    if record.is_file():
        found: Figures = json.loads(record.read_text())
        return found
    shutil.rmtree(place, ignore_errors=True)  # of a study that was stopped in this training
    config = load("finetune", FinetuneConfig, [*overrides, f"seed={seed}", "seeds=1", f"output={place}"])
    figures = finetune(config).figures[0]
    write_text_atomic(record, json.dumps(figures, indent=1))
    told = ", ".join(map(str, words))
    console().print(f"  {told}, seed {seed}: {100 * figures['accuracy']:.1f} %")
    return figures


def write_domain_json(folder: Path, rows: Sequence[tuple[str, str, str, Sequence[Figures]]]) -> None:
    """Writes ``domain.json``, which the report shows: per row method, source, target, and the figures of each seed."""
    found = [
        {"method": method, "source": source, "target": target, "seed": seed, "figures": figures}
        for method, source, target, seeds in rows
        for seed, figures in enumerate(seeds)
    ]
    write_text_atomic(folder / "domain.json", json.dumps({"rows": found, "figure": "accuracy"}, indent=1))


def against(values: list[float], base: list[float]) -> list[str]:
    """The paired difference from a baseline, in points, and what to make of it."""
    difference = paired_difference(values, base)
    return [difference.percent(signed=True), verdict(difference)]


def verdict(difference: Interval) -> str:
    """One of ``VERDICTS``: no gain means that the interval contains 0."""
    if difference.half == float("inf"):
        return "one seed"
    if difference.low > 0:
        return "helps"
    return "hurts" if difference.mean + difference.half < 0 else "no gain beyond chance"
