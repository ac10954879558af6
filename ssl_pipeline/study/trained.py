"""One training of a study across domains: measured once, and read where it has been."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.domain_split import split_domains
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.progress import console
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.interval import LEVEL, Interval, holm
from ssl_pipeline.study.grid import changes, digest_of_weights, settings_of

Figures = dict[str, float]
_OPENED: dict[tuple[str, str], tuple[IndexedDataset, IndexedDataset | None]] = {}
VERDICTS = ("helps", "no gain beyond chance", "hurts", "one seed")


def place_of(folder: Path, words: Sequence[object]) -> Path:
    """The run's folder of a training; its figures are beside it, with the ending ``.json``."""
    return folder / "cells" / re.sub(r"[^a-z0-9]+", "_", " ".join(map(str, words)).lower())


def check_places(rows: Iterable[Sequence[object]]) -> None:
    """Refuses rows whose names would share files.

    Raises:
        ConfigError: naming two.
    """
    seen = dict[Path, str]()
    for words in rows:
        place, told = place_of(Path(), words), ", ".join(map(str, words))
        if seen.setdefault(place, told) != told or not place.name.strip("_"):
            raise ConfigError(
                f"{told!r} and {seen[place]!r} would share the file {place.name}.json: files are named by small letters and digits, so "
                "name rows that differ in them."
            )


def checked(overrides: Sequence[str], with_unknown: bool = False) -> FinetuneConfig:
    """A row's configuration.

    Args:
        overrides: of ``finetune.yaml``.
        with_unknown: whether there must be images of unknown classes to measure on.

    Raises:
        ConfigError: it can't be read, starts from an encoder that nobody gave, or names domains that are not there.
    """
    config = load("finetune", FinetuneConfig, overrides)
    if config.encoder is None and config.backbone.weights is None and not config.starts_fresh:
        raise ConfigError(
            f"`encoder` is required: a row is of regime {config.regime.name}, which starts from pretrained weights. Give the folder "
            "of a stage-one run."
        )
    if config.encoder is not None and not Path(config.encoder).expanduser().exists():
        raise ConfigError(f"`encoder`: there is no {config.encoder!r}.")
    if config.domain is not None:
        pool, held_out = sources_of(config)
        across = split_domains(config.domain, pool, held_out)
        if with_unknown and across.unknown is None:
            raise ConfigError(
                f"there is no image of an unknown class among the held-out ones of {', '.join(across.targets)}: all of them are of "
                f"{', '.join(across.source.classes or ())}."
            )
    return config


def sources_of(config: FinetuneConfig) -> tuple[IndexedDataset, IndexedDataset | None]:
    """The images to learn from and those to measure on; opened once for all rows of a study."""
    data = config.scaled_data
    key = (data.model_dump_json(), config.split)
    if key not in _OPENED:
        pool = data.open("train")
        assert pool is not None
        _OPENED[key] = pool, data.open(config.split)
    return _OPENED[key]


def trained(folder: Path, words: Sequence[object], overrides: Sequence[str], seed: int) -> Figures:
    """A training's figures; read where they are there and of the same settings, weights and data, else measured and written.

    Args:
        folder: the study's.
        words: what tells the training from the study's others.
        overrides: of ``finetune.yaml``.
        seed: of label draw, head, order and views.

    Raises:
        ConfigError: they are there, and of other settings, weights or data.
    """
    place = place_of(folder, [*words, seed])
    record = place.with_name(f"{place.name}.json")
    config = load("finetune", FinetuneConfig, [*overrides, f"seed={seed}", "seeds=1", f"output={place}"])
    sources = [source for source in sources_of(config) if source is not None]
    own = {
        "settings": settings_of(config),
        "weights": digest_of_weights(config), "data": [source.fingerprint() for source in sources],
    }  # fmt: skip
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        changed = changes({key: found.get(key, "not there") for key in own}, own)
        if changed:
            raise ConfigError(
                [*changed[:3], f"{record} was measured before that: undo it, or choose another `output`."]
            )
        figures: Figures = found["figures"]
        return figures
    shutil.rmtree(place, ignore_errors=True)  # of a study that was stopped in this training
    figures = finetune(config).figures[0]
    write_json(record, {**own, "figures": figures})
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
    write_json(folder / "domain.json", {"rows": found, "figure": "accuracy"})


def verdicts(differences: Sequence[Interval]) -> list[str]:
    """What to make of paired differences, one of ``VERDICTS`` each; their p-values are corrected for their number by Holm.

    No gain beyond chance means a corrected p-value of 5 % or more, even where the difference's own 95 % interval is above 0.

    Args:
        differences: of one table: all that are compared with its baseline.
    """
    return [_verdict(one, p) for one, p in zip(differences, holm([one.p for one in differences]), strict=True)]


def _verdict(difference: Interval, p: float) -> str:
    if math.isnan(p):
        return "one seed"
    if p >= LEVEL:
        return "no gain beyond chance"
    return "helps" if difference.mean > 0 else "hurts"


def heading(comparisons: int) -> str:
    """Of a table's column of verdicts."""
    return f"verdict (Holm, {comparisons} comparison{'' if comparisons == 1 else 's'})" if comparisons else ""
