"""The grid of the study of label efficiency: initializations × regimes × label counts × seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.config.command import load
from ssl_pipeline.config.values import quoted
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.logger import TrackingConfig
from ssl_pipeline.study.cells import Cell

RegimeName = Literal["frozen", "lp_ft", "end_to_end"]
_SHARE = re.compile(r"(\d+\.?\d*|\.\d+)%")
_OFFICIAL = re.compile(r"(?P<name>[\w./-]+):(?P<weights>.+)")


class StudyConfig(FrozenModel):
    """What is compared.

    Attributes:
        encoders: by name what stage two starts from: ``random``; a stage-one run's folder; a list of such folders, of
            which each seed takes its own; or ``NETWORK:WEIGHTS`` of torchvision or timm, where the weights are official ones
            or a file. ``random`` is the first pretrained one's architecture with fresh weights.
        regimes: what is done with pretrained weights. Fresh ones are trained by ``scratch`` where any of them trains all layers,
            and kept as they are by ``frozen``.
        labels: how many: a number of each class, a share such as ``"10%"``, or ``all``.
        seeds: label draws, heads and views of each; paired over the encoders.
        common: overrides of ``finetune.yaml`` for all cells.
        overrides: overrides of ``finetune.yaml`` for the cells of one regime, by its name.
        reported_regime: the regime that the summary reports, chosen beforehand.
        knn: whether kNN of each encoder's features is measured beside the grid, which reads all training images.
        models: whether the first seed's models are kept.
        jobs: processes at a time; null takes one for each GPU, or one of one thread for each core.
        tracking: loggers of the whole study, beside ``study.json``; its cells are not logged.
        output: the study's folder; one that holds a part of this study is completed.
    """

    encoders: dict[str, str | tuple[str, ...]] = Field(min_length=1)
    regimes: tuple[RegimeName, ...] = Field(("frozen", "lp_ft", "end_to_end"), min_length=1)
    labels: tuple[int | str, ...] = Field((10,), min_length=1)
    seeds: int = Field(3, ge=1)
    common: tuple[str, ...] = ()
    overrides: dict[Literal["frozen", "lp_ft", "end_to_end", "scratch"], tuple[str, ...]] = Field({})
    reported_regime: RegimeName = "lp_ft"
    knn: bool = False
    models: bool = False
    jobs: int | None = Field(None, ge=1)
    tracking: TrackingConfig = TrackingConfig(name="off")
    output: str | None = None

    @field_validator("labels", "regimes")
    @classmethod
    def _once_each(cls, listed: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if len(set(listed)) < len(listed):
            raise ValueError("one stands there twice, and its figures would count twice: name each once.")
        return listed

    @field_validator("labels")
    @classmethod
    def _known_counts(cls, labels: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for one in labels:
            share = _SHARE.fullmatch(one) if isinstance(one, str) else None
            if not (one == "all" or (isinstance(one, int) and one >= 1) or (share and 0 < float(share[1]) <= 100)):
                raise ValueError(f"{one!r} is no number of labels: give 10 (of each class), '10%', or all.")
        return labels

    @property
    def trained_regime(self) -> RegimeName:
        """The regime that the summary speaks of: the claimed one, or the first where it is not among them."""
        return self.reported_regime if self.reported_regime in self.regimes else self.regimes[0]


def cells(config: StudyConfig) -> dict[str, list[Cell]]:
    """The grid, by initialization."""
    architecture = next((what for what in config.encoders.values() if what != "random"), None)
    grid = {}
    for name, what in config.encoders.items():
        fresh = what == "random"
        if isinstance(what, tuple) and len(what) != config.seeds:
            raise ConfigError(
                f"`encoders.{name}` lists {len(what)} run(s) and `seeds` is {config.seeds}: a list gives each seed a run of "
                "its own. Give as many, or one name for each run."
            )
        regimes: Sequence[str] = config.regimes
        if fresh:  # nothing to protect: what trains all layers is one regime, and counted once
            regimes = sorted({"frozen" if regime == "frozen" else "scratch" for regime in regimes})
        start = [*_start(architecture if fresh else what, fresh), *(["init=random"] if fresh else [])]
        grid[name] = list(_of_initialization(config, name, regimes, start, () if isinstance(what, str) else what))
    return grid


def _of_initialization(
    config: StudyConfig, name: str, regimes: Sequence[str], start: list[str], runs: Sequence[str]
) -> Iterator[Cell]:
    for regime in regimes:
        own = config.overrides.get(regime, ())  # type: ignore[call-overload]
        words = [*config.common, *start, f"regime={regime}", "tracking=off", *own]
        try:
            settled = load("finetune", FinetuneConfig, words)
        except ConfigError as error:
            raise ConfigError([
                f"{line} (In {name}'s cells, {regime}; `ssl-pipeline finetune --help` lists their keys.)"
                for line in str(error).splitlines()
            ]) from error  # fmt: skip
        if settled.domain is not None:
            raise ConfigError("`domain`: this study measures across no domains; `ssl-pipeline study domain` does.")
        for labels in config.labels:
            share = None if labels == "all" or isinstance(labels, int) else float(labels[:-1]) / 100
            per_class = labels if isinstance(labels, int) else None
            asked = settled.labels.model_copy(update={"per_class": per_class, "fraction": share})
            for place in range(config.seeds):
                update: dict[str, Any] = {"labels": asked, "seed": settled.seed + place, "seeds": 1}
                if runs:
                    update["encoder"] = runs[place]
                cell = settled.model_copy(update=update)
                yield Cell({"init": name, "regime": regime, "labels": labels}, cell.seed, cell)


def _start(what: str | tuple[str, ...] | None, fresh: bool) -> list[str]:
    """An initialization as overrides of ``finetune.yaml``; of a fresh one the architecture alone."""
    if what is None:
        return []
    place = what if isinstance(what, str) else what[0]
    found = None if Path(place).expanduser().exists() else _OFFICIAL.fullmatch(place)
    if found is None:
        return [f"encoder={quoted(place)}"]
    weights = [f"backbone.weights={quoted(found['weights'])}"]  # may be out of reach where they are not wanted
    return [f"backbone.name={quoted(found['name'])}", *([] if fresh else weights)]
