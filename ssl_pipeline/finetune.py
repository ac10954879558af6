"""Stage two from top to bottom: a pretrained encoder and a few labels go in, a model and honest figures come out."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from pydantic import Field

from ssl_pipeline.config.base import ComponentOf, ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.loader import DistInfo, Preprocessing
from ssl_pipeline.data.pretrained_range import at_range_of
from ssl_pipeline.data.source import IndexedDataset, SourceConfig
from ssl_pipeline.domain.across import DomainSplit, split_domains
from ssl_pipeline.domain.method import MethodConfig
from ssl_pipeline.domain.train import train_across
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.consistency import ConsistencyConfig, UnlabeledImages
from ssl_pipeline.downstream.finished import Model, load_model
from ssl_pipeline.downstream.labels import LabeledSplit, LabelsConfig, describe_labels, draw, unlabeled_pool
from ssl_pipeline.downstream.regime import CheckpointConfig, RegimeConfig, TrainContext, train
from ssl_pipeline.downstream.selection import selection
from ssl_pipeline.downstream.start import check_channels, new_encoder, pretrained_encoder
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.downstream.vector import targets_of
from ssl_pipeline.engine.distributed import (
    broadcast_from_main,
    dist_info,
    move_to_device,
    run_on_main,
    start_accelerator,
)
from ssl_pipeline.engine.launcher import save_with_launcher
from ssl_pipeline.engine.lost import clean_distributed_exit
from ssl_pipeline.engine.memory import check_memory, processes_here
from ssl_pipeline.engine.signals import handle_signals, install_signal_handlers
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.evaluation.pictures import ImageLogger
from ssl_pipeline.evaluation.result import Result, finished_seeds
from ssl_pipeline.logging.jsonl import seconds_before
from ssl_pipeline.logging.logger import LoggerCollection, TrackingConfig, open_loggers
from ssl_pipeline.logging.progress import console, duration, print_table, silence_other_ranks
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import Resume, Run, open_run, versions
from ssl_pipeline.logging.training import TrainingCurves, trained_steps
from ssl_pipeline.metrics.confusion import confusion_matrix
from ssl_pipeline.models.artifact import Card, EncoderSpec, finite, save, write_card
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.weights import digest
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.schedules import Duration, parse_duration
from ssl_pipeline.transforms.policy import Views, ViewsConfig

_log = logging.getLogger("ssl_pipeline")


class FinetuneConfig(FrozenModel):
    """Everything that stage two is told; each field's model says what its keys mean.

    Attributes:
        encoder: a stage-one run's folder, or its ``encoder.safetensors``.
        initialization: ``random`` takes the same architecture with fresh weights, to compare with.
        size: height and width of the images in pixels; null is those that the encoder was pretrained on.
        data: images with labels.
        views: mild views for training; measuring uses none.
        backbone: the network where no encoder is given; an encoder brings its own.
        neck: likewise.
        downstream: what the labels are for.
        regime: which layers are trained, and how.
        domain: a method across domains; null learns and measures on all of them alike.
        labels: how many labels are used, and how many of them are held out.
        unlabeled: how the other training images are learned from, without labels; null leaves them alone.
        tracking: who hears of the run beside ``metrics.jsonl``.
        seed: of label draws, head, order and views.
        seeds: repeats with other seeds; the figure is their mean with a 95 % interval.
        split: what the figure is of; ``dev`` to tune a recipe.
        output: the run's folder; null numbers them.
        resume: ``auto`` continues the run in ``output``; ``changed`` does so despite another configuration or data.
        checkpoint_every: how often the state of a training is kept to resume from, of its length.
        keep_checkpoints: how many of a training are kept; a seed that is done keeps none.
        workers: processes that decode files; null settles it by the machine.
    """

    encoder: str | None = None
    initialization: Literal["pretrained", "random"] = "pretrained"
    size: int | None = Field(None, ge=8)
    data: Annotated[SourceConfig, ComponentOf("data.sources")]
    views: ViewsConfig
    backbone: BackboneConfig
    neck: NeckConfig
    downstream: Annotated[DownstreamConfig, ComponentOf("downstream")]
    regime: RegimeConfig
    domain: Annotated[MethodConfig | None, ComponentOf("domain")] = None
    labels: LabelsConfig
    unlabeled: ConsistencyConfig | None = None
    tracking: TrackingConfig
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1)
    split: Literal["test", "dev"] = "test"
    output: str | None = None
    resume: Resume = "no"
    checkpoint_every: Duration = parse_duration("10%")
    keep_checkpoints: int = Field(2, ge=1)
    workers: int | None = Field(None, ge=0)

    @property
    def starts_fresh(self) -> bool:
        """Whether the encoder's weights are random."""
        return self.initialization == "random" or self.regime.name == "scratch"


def check(config: FinetuneConfig, pool: IndexedDataset, held_out: IndexedDataset | None) -> None:
    """What can't go together, all of it at once, before anything is written.

    Raises:
        ConfigError: naming each problem.
    """
    problems = config.downstream.check(
        pool, held_out if config.domain is None else None
    ) + config.downstream.check_regime(config.regime.name)
    if not problems and held_out is None:
        problems.append(f"{pool.name} has no `{config.split}` split to measure on: see its keys in `configs/data`.")
    starts_from = config.domain.starts_from if config.domain is not None else None
    if starts_from is not None and (config.encoder is not None or config.starts_fresh):
        problems.append(
            "`domain.model` brings its own encoder: leave `encoder` out, and take regime lp_ft or end_to_end."
        )
    elif starts_from is None and config.encoder is None and config.backbone.weights is None and not config.starts_fresh:
        problems.append("`encoder` is required: the folder of a stage-one run (or give `backbone.weights`).")
    if config.regime.statistics == "kept" and config.starts_fresh:
        problems.append(
            "`regime.statistics` keeps what stage one has estimated, and fresh weights have no such: set it to batch."
        )
    problems += config.downstream.check_views(config.views)
    if config.domain is not None:
        problems += config.domain.check(config.downstream.name, config.regime.name)
        problems += config.domain.check_head(getattr(config.downstream, "head", None))
        problems += config.domain.check_statistics(config.regime.statistics == "kept")
        problems += config.data.shown_by_views(config.views.each(), config.domain.target)
    if config.unlabeled is not None:
        across = config.domain is not None
        problems += config.unlabeled.check(config.downstream.name, config.regime.name, across, pool)
    if config.views.count != 1:
        problems.append(f"`views.count` is {config.views.count}, and stage two needs 1.")
    if config.views.restyle.probability:
        problems.append(
            "`views.restyle` is for stage one: set its probability to 0 (`domain=exemplar_memory` restyles)."
        )
    if config.views.local.count:
        problems.append(f"`views.local.count` is {config.views.local.count}, and stage two takes no local views.")
    if problems:
        raise ConfigError(problems)


def finished_model(config: FinetuneConfig) -> Model | None:
    """The finished model that a method across domains starts from, if it does."""
    folder = config.domain.starts_from if config.domain is not None else None
    return None if folder is None else load_model(folder)


def starting_point(
    config: FinetuneConfig, pool: IndexedDataset, model: Model | None = None
) -> tuple[EncoderSpec, Encoder | None]:
    """What stage two starts from: an architecture and, unless it is to be random, its pretrained encoder."""
    if model is not None:
        check_channels(model.card.blueprint, "the model in `domain.model`", pool)
        return model.card.blueprint, model.task.encoder
    if config.encoder is not None:
        blueprint, encoder = pretrained_encoder(config.encoder, pool, config.size)
    else:
        size = config.size or config.views.size
        blueprint, encoder, notes = new_encoder(config.backbone, config.neck, pool, size)
        for note in notes if config.backbone.weights is not None else []:
            console().print(note, markup=False)
    return blueprint, None if config.starts_fresh else encoder


def finetune(config: FinetuneConfig) -> Result:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    accelerator = start_accelerator()
    silence_other_ranks(accelerator.is_main_process)
    share = dist_info(accelerator)
    starts_from = config.encoder or (config.domain.starts_from if config.domain is not None else None)
    config = config.model_copy(update={"data": at_range_of(config.data, starts_from)})
    pool, held_out = config.data.open("train"), config.data.open(config.split)
    assert pool is not None
    model = finished_model(config)
    if model is not None:  # its bottleneck and head are those that it was trained with
        config = config.model_copy(update={"downstream": model.config})
    classes = None if model is None else model.classes
    across = split_domains(config.domain, pool, held_out, classes) if config.domain is not None else None
    pool = pool if across is None else across.source
    check(config, pool, held_out)
    assert held_out is not None
    assert pool.classes is not None
    if accelerator.is_main_process and config.tracking.terminal != "quiet":
        console().print(f"finetune: {describe_labels(pool, held_out, config.split)}", markup=False)
    blueprint, pretrained = starting_point(config, pool, model)
    preprocessing = Preprocessing.of(blueprint)
    policy, _ = config.views.model_copy(update={"size": blueprint.size}).for_channels(pool.channels)
    seeds = range(config.seed, config.seed + config.seeds)
    # Drawn here, so that too few labels are told before anything is written.
    labeled = {seed: draw_labeled(config, pool, across, seed) for seed in seeds}

    if share.device.type == "cpu" and config.regime.trains_all and model is None:
        task = build_task(config, blueprint, pretrained, len(pool.classes), config.seed, share)
        images = min(config.regime.batch, len(labeled[config.seed].train)) // share.processes
        check_memory(
            task, policy.shapes(blueprint.channels), max(1, images), None, config.regime.optim.name, processes_here(share.processes),
            "regime.batch", "size", None,
        )  # fmt: skip

    data = {"train": pool.fingerprint(), config.split: held_out.fingerprint()}
    data |= {} if across is None else {"target": across.target.fingerprint()}
    beside = config.unlabeled.open(pool.channels) if config.unlabeled is not None else None
    data |= {} if beside is None else {"unlabeled": beside.fingerprint()}
    data |= {} if pretrained is None else {"encoder": digest(pretrained if model is None else model.task)}
    run, folder, finished = open_folder(config, data, seeds, accelerator)
    result = Result(folder, config.split)
    with (
        run or nullcontext(),
        open_loggers(run, "finetune", dump(config), config.tracking, max(finished, default=-1)) as trackers,
        handle_signals(run.path if run else None),
    ):
        result.selection.update(selection(config.labels, config.downstream, config.regime, labeled[config.seed]))
        if run is not None and config.labels.validation == "auto" and config.tracking.terminal != "quiet":
            console().print(result.selection["why"], markup=False)
        if finished:
            result.take_confusion()
        if config.encoder is not None and not config.starts_fresh:
            trackers.use_model(config.encoder)
        before = trained_steps(folder, finished)
        curves = TrainingCurves(trackers, config.tracking.terminal, run is not None, before)
        for seed in seeds:
            if seed in finished:
                result.figures.append(finished[seed])
                continue
            task = (
                build_task(config, blueprint, pretrained, len(pool.classes), seed, share)
                if model is None
                else move_to_device(copy.deepcopy(model.task), share)
            )
            views = Views(policy, blueprint.mean, blueprint.std, seed)
            kept = folder / "checkpoints" / f"seed-{seed}"
            keeping = CheckpointConfig(kept, config.checkpoint_every, config.keep_checkpoints, run is not None)
            around = TrainContext(
                labeled[seed], views, preprocessing, seed, accelerator, share, config.workers, keeping, curves,
                unlabeled=open_unlabeled(config, blueprint, pool, seed),
            )  # fmt: skip
            train_task(config, task, across, around)
            first = run is not None and seed == config.seed  # by rule the first seed's model, not the best one's
            if run is not None and first:  # before anything is measured, which must not lose it
                save(run.path, task, model_card(config, blueprint, pool, {}))
            curves.say(f"seed {seed}, measuring on {len(held_out):,} images of {config.split}")
            figures = finite(measure(task, across, held_out, around))
            result.figures.append(figures)
            if seed == config.seed and across is None and isinstance(task, Classification):
                log_confusion_matrix(result, task, held_out, pool.classes, around, trackers)
            if run is not None and first:
                write_card(run.path, model_card(config, blueprint, pool, figures))
            trackers.log(seed, {f"{config.split}/{name}": value for name, value in figures.items()})
            if run is not None:
                shutil.rmtree(kept, ignore_errors=True)
        if run is not None:
            result.write()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def draw_labeled(config: FinetuneConfig, pool: IndexedDataset, across: DomainSplit | None, seed: int) -> LabeledSplit:
    """The labeled images of a seed, and those of them that are held out."""
    if across is not None:
        return across.draw(config.labels, config.downstream, seed)
    return draw(config.labels, config.downstream, pool, seed)


def open_unlabeled(
    config: FinetuneConfig, blueprint: EncoderSpec, pool: IndexedDataset, seed: int
) -> UnlabeledImages | None:
    """What a seed learns from without labels; None where nothing is asked for."""
    if config.unlabeled is None:
        return None
    policy, _ = config.unlabeled.views.model_copy(update={"size": blueprint.size}).for_channels(pool.channels)
    views = Views(policy, blueprint.mean, blueprint.std, derive_seed(seed, "unlabelled"))
    images = config.unlabeled.open(pool.channels)
    return UnlabeledImages(
        config.unlabeled, images or unlabeled_pool(config.labels, config.downstream, pool, seed), views
    )


def open_folder(
    config: FinetuneConfig, data: dict[str, str], seeds: range, accelerator: Accelerator
) -> tuple[Run | None, Path, dict[int, dict[str, float]]]:
    """Makes or continues the run's folder.

    Returns:
        Its open folder (None in all processes but the main one); its path; and the figures of the seeds that are done.
    """
    run = run_on_main(accelerator, lambda: open_run(config.output, "finetune", config.resume, dump(config), data=data))
    with run.closed_on_error() if run is not None else nullcontext():
        if run is not None and run.changes:  # seeds of two configurations make no mean
            _log.warning(
                "the configuration or data has changed: all seeds are trained from their start, none is continued."
            )
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        done = finished_seeds(run.path, seeds, config.split) if run is not None and not run.changes else {}
        folder, finished = broadcast_from_main(accelerator, (run.path if run else Path(), done))
    return run, folder, finished


def build_task(
    config: FinetuneConfig, blueprint: EncoderSpec, pretrained: Encoder | None, classes: int, seed: int, share: DistInfo
) -> DownstreamTask:
    """A seed's task on this process's device, around a copy of the pretrained encoder or one of fresh weights."""
    torch.manual_seed(derive_seed(seed, "initialisation"))
    encoder = copy.deepcopy(pretrained) if pretrained is not None else blueprint.build()[0]
    return move_to_device(config.downstream.build(encoder, classes), share)


def train_task(config: FinetuneConfig, task: DownstreamTask, across: DomainSplit | None, around: TrainContext) -> None:
    """Trains a task in place, by its regime or by a method across domains."""
    if across is None:
        train(config.regime, task, around)
        return
    assert isinstance(task, Classification)  # a method's `check` allows no other
    train_across(across.method, config.regime, task, across.target, around)


def measure(
    task: DownstreamTask, across: DomainSplit | None, held_out: IndexedDataset, around: TrainContext
) -> dict[str, float]:
    """The figures of a trained task on held-out images; of a method across domains on each domain."""
    if across is None:
        return task.evaluate(held_out, around.preprocessing, around.share)
    assert isinstance(task, Classification)
    return across.evaluate(task, around.labeled, around.preprocessing, around.share)


def log_confusion_matrix(
    result: Result, task: Classification, held_out: IndexedDataset, classes: tuple[str, ...], around: TrainContext, trackers: LoggerCollection
) -> None:  # fmt: skip
    """Puts the confusion of a seed's classes into the result, keeps it for a run that is stopped, and draws it."""
    logits, read = extract_readable(task, held_out, around.preprocessing, around.share, forward=task.predict)
    matrix = confusion_matrix(logits.argmax(1), targets_of(held_out)[read], len(classes))
    result.confusion.update(classes=list(classes), matrix=matrix.tolist())
    ImageLogger(trackers).confusion(around.seed, matrix, classes)
    if around.accelerator.is_main_process:
        result.keep_confusion()


def model_card(config: FinetuneConfig, blueprint: EncoderSpec, pool: IndexedDataset, figures: dict[str, float]) -> Card:
    """What a model is, and whether its encoder was pretrained: ``regime=scratch`` alone says that it was not."""
    settings = redact(dump(config)) | {"initialization": "random" if config.starts_fresh else "pretrained"}
    return Card(
        kind="model", blueprint=blueprint, config=settings, figures=figures, versions=versions(), classes=pool.classes,
        data={"name": pool.name, "fingerprint": pool.fingerprint(), "license": pool.license},
    )  # fmt: skip


def finetune_and_tell(config: FinetuneConfig) -> None:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    began = time.monotonic()
    result = finetune(config)
    if start_accelerator().is_main_process and config.tracking.terminal != "quiet":
        unit = ", in %" if config.downstream.in_percent else ""
        title = f"{config.regime.name} on {config.split}, {config.seeds} seed(s){unit}"
        print_table(title, ["figure", "mean ± 95 %"], result.rows(config.downstream.in_percent))
        seconds = seconds_before(result.folder) + time.monotonic() - began
        console().print(f"{duration(seconds)}; wrote", end=" ")
        console().print(f"{result.folder / 'model.safetensors'}, card.json and results.json")


def main() -> None:
    """The command line."""
    install_signal_handlers()
    save_with_launcher()
    with clean_distributed_exit():
        run_command("finetune", FinetuneConfig, finetune_and_tell)


if __name__ == "__main__":
    main()
