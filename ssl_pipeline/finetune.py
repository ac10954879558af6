"""Stage two from top to bottom: a pretrained encoder and a few labels go in, a model and honest figures come out."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ssl_pipeline.config.base import ConfigError, Room, Strict, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.loader import Preprocessing
from ssl_pipeline.data.source import Indexed, SourceConfig
from ssl_pipeline.data.splits import draw_labels, hold_out
from ssl_pipeline.downstream.regime import Labelled, RegimeConfig, score, train
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.draws import derive_seed
from ssl_pipeline.engine.distributed import from_main, leave_group, on_main, share_of, start_accelerator
from ssl_pipeline.evaluate.interval import Interval, interval
from ssl_pipeline.model.artifact import Blueprint, Card, load_encoder, save
from ssl_pipeline.model.backbone import BackboneConfig
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.model.neck import NeckConfig
from ssl_pipeline.model.weights import normalisation
from ssl_pipeline.track.progress import console, print_table
from ssl_pipeline.track.run import open_run, versions, write_text_atomic
from ssl_pipeline.track.tracker import TrackingConfig, open_trackers
from ssl_pipeline.views.policy import Views, ViewsConfig


class LabelsConfig(Strict):
    """How many labels stage two may read; all of them by default.

    Attributes:
        per_class: labels of each class, drawn by the seed.
        fraction: or a share of all labels, drawn by the seed.
        validation: the share of the drawn labels that is held out for selection; 0 selects nothing.
    """

    per_class: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    validation: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> LabelsConfig:
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("give `per_class` or `fraction`, not both.")
        return self


class FinetuneConfig(Strict):
    """Everything that stage two is told; each field's model says what its keys mean."""

    encoder: str | None = None
    initialisation: Literal["pretrained", "random"] = "pretrained"
    data: Annotated[SourceConfig, Room("data.sources")]
    views: ViewsConfig
    backbone: BackboneConfig
    neck: NeckConfig
    downstream: Annotated[DownstreamConfig, Room("downstream")]
    regime: RegimeConfig
    labels: LabelsConfig
    tracking: TrackingConfig
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1)
    split: Literal["test", "dev"] = "test"
    output: str | None = None
    workers: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class Result:
    """What stage two gives: the run's folder, and per seed the figures on the held-out split."""

    folder: Path
    figures: list[dict[str, float]]

    def interval(self, name: str = "accuracy") -> Interval:
        """A figure's mean over the seeds, with its 95 % interval."""
        return interval([figures[name] for figures in self.figures])


def check(config: FinetuneConfig, pool: Indexed, held_out: Indexed | None) -> None:
    """What can't go together, all of it at once, before anything is written.

    Raises:
        ConfigError: naming each problem.
    """
    problems = config.downstream.check(pool)
    if not problems and held_out is None:
        problems.append(f"{pool.name} has no `{config.split}` split to measure on: see its keys in `configs/data`.")
    if config.regime.name == "frozen" and config.downstream.bottleneck.width is not None:
        problems.append(
            "`downstream.bottleneck` is new and must be trained, and regime `frozen` trains the head alone."
        )
    fresh = config.initialisation == "random" or config.regime.name == "scratch"
    if config.encoder is None and config.backbone.weights is None and not fresh:
        problems.append("`encoder` is required: the folder of a stage-one run (or give `backbone.weights`).")
    if config.views.count != 1:
        problems.append(f"`views.count` is {config.views.count}, and stage two needs 1.")
    if config.views.local.count:
        problems.append(f"`views.local.count` is {config.views.local.count}, and stage two takes no local views.")
    if problems:
        raise ConfigError(problems)


def learn_from(config: FinetuneConfig, pool: Indexed, seed: int) -> Labelled:
    """Draws a seed's labels, and holds some of them out for selection."""
    assert pool.labels is not None
    drawn = pool.select(draw_labels(pool.labels, config.labels.per_class, config.labels.fraction, seed, pool.classes))
    count = round(config.labels.validation * len(drawn))
    if count == 0:
        return Labelled(drawn, None)
    assert drawn.labels is not None
    rest, held_out = hold_out(drawn.labels, count, seed, "validation")
    return Labelled(drawn.select(rest), drawn.select(held_out))


def starting_point(config: FinetuneConfig, pool: Indexed) -> tuple[Blueprint, Encoder | None]:
    """What stage two starts from: an architecture and, unless it is to be random, its pretrained encoder."""
    if config.encoder is not None:
        encoder, card = load_encoder(config.encoder)
        blueprint = card.blueprint.without_weights()
        if blueprint.channels != pool.channels:
            raise ConfigError(
                f"the encoder in {config.encoder!r} reads {blueprint.channels} channel(s), and {pool.name} has "
                f"{pool.channels}: set `data.channels` or pretrain on such images."
            )
    else:
        mean, std = normalisation(config.backbone, pool.channels, pool.mean, pool.std)
        blueprint = Blueprint(
            backbone=config.backbone,
            neck=config.neck,
            channels=pool.channels,
            size=config.views.size,
            mean=mean,
            std=std,
        )
        encoder, _ = blueprint.build()
    random = config.regime.name == "scratch" or config.initialisation == "random"
    return blueprint.without_weights(), None if random else encoder


def finetune(config: FinetuneConfig) -> Result:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    accelerator = start_accelerator()
    share = share_of(accelerator)
    pool, held_out = config.data.open("train"), config.data.open(config.split)
    assert pool is not None
    check(config, pool, held_out)
    assert held_out is not None
    assert pool.classes is not None
    blueprint, pretrained = starting_point(config, pool)
    preprocessing = Preprocessing(blueprint.size, blueprint.mean, blueprint.std)
    views_config, _ = config.views.model_copy(update={"size": blueprint.size}).for_channels(pool.channels)
    seeds = range(config.seed, config.seed + config.seeds)
    labelled = {
        seed: learn_from(config, pool, seed) for seed in seeds
    }  # too few labels are told before anything is written

    run = on_main(accelerator, lambda: open_run(config.output, "finetune", "no", dump(config)))
    folder = from_main(accelerator, run.path if run else Path())
    figures: list[dict[str, float]] = []
    with run or nullcontext(), open_trackers(run, "finetune", dump(config), config.tracking, 0) as trackers:
        for seed in seeds:
            torch.manual_seed(derive_seed(seed, "initialisation"))
            encoder = copy.deepcopy(pretrained) if pretrained is not None else blueprint.build()[0]
            task = config.downstream.build(encoder, len(pool.classes))
            if share.processes > 1 and share.device.type == "cuda":
                task = nn.SyncBatchNorm.convert_sync_batchnorm(task)
            task = task.to(share.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            views = Views(views_config, blueprint.mean, blueprint.std, seed)
            train(config.regime, task, labelled[seed], views, preprocessing, seed, accelerator, share, config.workers)
            figures.append(score(task, held_out, preprocessing, share))
            trackers.log(seed, {f"{config.split}/{name}": value for name, value in figures[-1].items()})
            if run is not None and seed == config.seed:  # by rule the first seed's model, not the best one's
                save(folder, task, Card(
                    kind="model", blueprint=blueprint, config=dump(config), figures=figures[0], versions=versions(),
                    data={"name": pool.name, "fingerprint": pool.fingerprint(), "licence": pool.licence}, classes=pool.classes,
                ))  # fmt: skip
    if run is not None:
        record = {"split": config.split, "seeds": config.seeds, "figures": figures}
        write_text_atomic(folder / "results.json", json.dumps(record, indent=1))
    return Result(folder, figures)


def finetune_and_tell(config: FinetuneConfig) -> None:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    result = finetune(config)
    if start_accelerator().is_main_process:
        rows = [[name, result.interval(name).percent()] for name in result.figures[0]]
        title = f"{config.regime.name} on {config.split}, {config.seeds} seed(s), in %"
        print_table(title, ["figure", "mean ± 95 %"], rows)
        console().print(f"wrote {result.folder / 'model.safetensors'}, card.json and results.json")


def main() -> None:
    """The command line."""
    run_command("finetune", FinetuneConfig, finetune_and_tell)
    leave_group()


if __name__ == "__main__":
    main()
