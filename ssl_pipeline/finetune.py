"""Stage two from top to bottom: a pretrained encoder and a few labels go in, a model and honest figures come out."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ssl_pipeline.config.base import ConfigError, Room, Strict, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.loader import Preprocessing
from ssl_pipeline.data.source import Indexed, SourceConfig
from ssl_pipeline.domain.across import split_domains
from ssl_pipeline.domain.method import MethodConfig
from ssl_pipeline.domain.train import train_across
from ssl_pipeline.downstream.labels import LabelsConfig, draw
from ssl_pipeline.downstream.regime import RegimeConfig, Surroundings, train
from ssl_pipeline.downstream.start import new_encoder, pretrained_encoder
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.draws import derive_seed
from ssl_pipeline.engine.distributed import from_main, leave_group, on_main, share_of, start_accelerator
from ssl_pipeline.evaluate.result import Result
from ssl_pipeline.model.artifact import Blueprint, Card, save
from ssl_pipeline.model.backbone import BackboneConfig
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.model.neck import NeckConfig
from ssl_pipeline.track.progress import console, print_table
from ssl_pipeline.track.run import open_run, versions
from ssl_pipeline.track.tracker import TrackingConfig, open_trackers
from ssl_pipeline.views.policy import Views, ViewsConfig


class FinetuneConfig(Strict):
    """Everything that stage two is told; each field's model says what its keys mean."""

    encoder: str | None = None
    initialisation: Literal["pretrained", "random"] = "pretrained"
    size: int | None = Field(None, ge=8)
    data: Annotated[SourceConfig, Room("data.sources")]
    views: ViewsConfig
    backbone: BackboneConfig
    neck: NeckConfig
    downstream: Annotated[DownstreamConfig, Room("downstream")]
    regime: RegimeConfig
    domain: Annotated[MethodConfig | None, Room("domain")] = None
    labels: LabelsConfig
    tracking: TrackingConfig
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1)
    split: Literal["test", "dev"] = "test"
    output: str | None = None
    workers: int | None = Field(None, ge=0)

    @property
    def starts_fresh(self) -> bool:
        """Whether the encoder's weights are random."""
        return self.initialisation == "random" or self.regime.name == "scratch"


def check(config: FinetuneConfig, pool: Indexed, held_out: Indexed | None) -> None:
    """What can't go together, all of it at once, before anything is written.

    Raises:
        ConfigError: naming each problem.
    """
    problems = config.downstream.check(
        pool, held_out if config.domain is None else None
    ) + config.downstream.check_regime(config.regime.name)
    if not problems and held_out is None:
        problems.append(f"{pool.name} has no `{config.split}` split to measure on: see its keys in `configs/data`.")
    if config.encoder is None and config.backbone.weights is None and not config.starts_fresh:
        problems.append("`encoder` is required: the folder of a stage-one run (or give `backbone.weights`).")
    problems += config.downstream.check_views(config.views)
    problems += config.domain.check(config.downstream.name, config.regime.name) if config.domain is not None else []
    if config.views.count != 1:
        problems.append(f"`views.count` is {config.views.count}, and stage two needs 1.")
    if config.views.local.count:
        problems.append(f"`views.local.count` is {config.views.local.count}, and stage two takes no local views.")
    if problems:
        raise ConfigError(problems)


def starting_point(config: FinetuneConfig, pool: Indexed) -> tuple[Blueprint, Encoder | None]:
    """What stage two starts from: an architecture and, unless it is to be random, its pretrained encoder."""
    if config.encoder is not None:
        blueprint, encoder = pretrained_encoder(config.encoder, pool, config.size)
    else:
        blueprint, encoder = new_encoder(config.backbone, config.neck, pool, config.size or config.views.size)
    return blueprint, None if config.starts_fresh else encoder


def finetune(config: FinetuneConfig) -> Result:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    accelerator = start_accelerator()
    share = share_of(accelerator)
    pool, held_out = config.data.open("train"), config.data.open(config.split)
    assert pool is not None
    domain = config.domain
    across = split_domains(domain, pool, held_out) if domain is not None else None
    pool = pool if across is None else across.source
    check(config, pool, held_out)
    assert held_out is not None
    assert pool.classes is not None
    blueprint, pretrained = starting_point(config, pool)
    preprocessing = Preprocessing(blueprint.size, blueprint.mean, blueprint.std)
    policy, _ = config.views.model_copy(update={"size": blueprint.size}).for_channels(pool.channels)
    seeds = range(config.seed, config.seed + config.seeds)
    # Drawn here, so that too few labels are told before anything is written.
    pools = {s: pool if across is None else across.labelled(s) for s in seeds}
    labelled = {seed: draw(config.labels, config.downstream, pools[seed], seed) for seed in seeds}

    run = on_main(accelerator, lambda: open_run(config.output, "finetune", "no", dump(config)))
    result = Result(from_main(accelerator, run.path if run else Path()), config.split)
    with run or nullcontext(), open_trackers(run, "finetune", dump(config), config.tracking, 0) as trackers:
        for seed in seeds:
            torch.manual_seed(derive_seed(seed, "initialisation"))
            encoder = copy.deepcopy(pretrained) if pretrained is not None else blueprint.build()[0]
            task = config.downstream.build(encoder, len(pool.classes))
            if share.processes > 1 and share.device.type == "cuda":
                task = nn.SyncBatchNorm.convert_sync_batchnorm(task)
            task = task.to(share.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            views = Views(policy, blueprint.mean, blueprint.std, seed)
            around = Surroundings(labelled[seed], views, preprocessing, seed, accelerator, share, config.workers)
            if across is None:
                train(config.regime, task, around)
                figures = task.evaluate(held_out, preprocessing, share)
            else:
                train_across(across.method, config.regime, task, across.target, around)
                figures = across.evaluate(task, labelled[seed], preprocessing, share)
            result.figures.append(figures)
            trackers.log(seed, {f"{config.split}/{name}": value for name, value in figures.items()})
            if run is not None and seed == config.seed:  # by rule the first seed's model, not the best one's
                save(run.path, task, Card(
                    kind="model", blueprint=blueprint, config=dump(config), figures=figures, versions=versions(),
                    data={"name": pool.name, "fingerprint": pool.fingerprint(), "licence": pool.licence}, classes=pool.classes,
                ))  # fmt: skip
    if run is not None:
        result.write()
    return result


def finetune_and_tell(config: FinetuneConfig) -> None:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    result = finetune(config)
    if start_accelerator().is_main_process:
        unit = ", in %" if config.downstream.in_percent else ""
        title = f"{config.regime.name} on {config.split}, {config.seeds} seed(s){unit}"
        print_table(title, ["figure", "mean ± 95 %"], result.rows(config.downstream.in_percent))
        console().print(f"wrote {result.folder / 'model.safetensors'}, card.json and results.json")


def main() -> None:
    """The command line."""
    run_command("finetune", FinetuneConfig, finetune_and_tell)
    leave_group()


if __name__ == "__main__":
    main()
