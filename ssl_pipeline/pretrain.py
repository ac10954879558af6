"""Stage one from top to bottom: images without labels go in, a backbone comes out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import Field

from ssl_pipeline.config.base import ComponentOf, ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.lanes import StreamLoader, build_loader
from ssl_pipeline.data.loader import IndexedLoader, Preprocessing
from ssl_pipeline.data.source import IndexedDataset, SourceConfig
from ssl_pipeline.data.stream import StreamDataset, describe_size, describe_splits, known_length, open_training, preview
from ssl_pipeline.data.styles import build_views
from ssl_pipeline.data.value_range import describe_range
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.continuing import check_steps_left, go_on, in_words
from ssl_pipeline.engine.distributed import (
    batchnorm_notes,
    broadcast_from_main,
    check_same_start,
    dist_info,
    move_to_device,
    run_on_main,
    start_accelerator,
)
from ssl_pipeline.engine.fit import fit
from ssl_pipeline.engine.launcher import save_with_launcher
from ssl_pipeline.engine.lost import clean_distributed_exit
from ssl_pipeline.engine.memory import check_memory, processes_here
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.sharded import check_shardable
from ssl_pipeline.engine.signals import handle_signals, install_signal_handlers
from ssl_pipeline.engine.task import PretextConfig, Task
from ssl_pipeline.evaluation.alerts import open_alerts
from ssl_pipeline.evaluation.best import BestEncoder
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.evaluation.gain import untrained_figures, without_gain
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.evaluation.pictures import ImageLogger
from ssl_pipeline.evaluation.watch import OnlineEvalCallback
from ssl_pipeline.logging.jsonl import seconds_before
from ssl_pipeline.logging.logger import TrackingConfig, open_loggers
from ssl_pipeline.logging.progress import Progress, silence_other_ranks
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import Resume, Run, open_run, versions
from ssl_pipeline.models.artifact import Card, EncoderSpec, save, write_card
from ssl_pipeline.models.backbone import Backbone, BackboneConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.weights_input import weights_input
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.schedules import Duration, parse_duration
from ssl_pipeline.transforms.policy import ViewsConfig


class BatchConfig(FrozenModel):
    """The batch.

    Attributes:
        size: images of a step over all processes; where there are fewer, the largest batch that they make, which is said.
        micro: images that a process embeds at once: the two-pass form (``engine/two_pass.py``) gives the gradient of the whole
            batch at the memory of a small one. By default a process's whole share.
    """

    short_for: ClassVar[str | None] = "size"
    size: int = Field(256, ge=2)
    micro: int | None = Field(None, ge=2)


class PretrainConfig(FrozenModel):
    """Everything that stage one is told; each field's model says what its keys mean.

    Attributes:
        data: what to learn from.
        views: how an image becomes its random views.
        backbone: the network that learns.
        neck: what makes one row of features of the backbone's maps.
        pretext: what the network is asked.
        optim: how it is moved.
        tracking: who hears of the run beside ``metrics.jsonl``.
        batch: how many images a step sees.
        epochs: the run's length.
        steps: a length in optimizer steps instead.
        seed: of every draw: initialization, order, views.
        output: the run's folder; null numbers them: ``runs/pretrain-001``, ….
        resume: ``auto`` continues the run in ``output``; ``changed`` does so despite another configuration or data.
        evaluate_every: how often kNN and the signs of collapse are measured; ``0 steps`` at the end only.
        checkpoint_every: how often a state to resume from is kept; ``0 steps`` at the end only.
        keep_checkpoints: how many of them.
        log_every: optimizer steps from one line of metrics to the next.
        workers: processes that decode files; null settles it by the machine.
    """

    wins_over: ClassVar[Mapping[str, str]] = {"steps": "epochs"}
    data: Annotated[SourceConfig, ComponentOf("data.sources")]
    views: ViewsConfig
    backbone: BackboneConfig
    neck: NeckConfig
    pretext: Annotated[PretextConfig, ComponentOf("pretext")]
    optim: OptimConfig
    tracking: TrackingConfig
    batch: BatchConfig
    epochs: int = Field(100, ge=1)
    steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    output: str | None = None
    resume: Resume = "no"
    evaluate_every: Duration = parse_duration("10%")
    checkpoint_every: Duration = parse_duration("10%")
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1)
    workers: int | None = Field(None, ge=0)

    def total_steps(self, samples: int | None) -> int:
        """The run's length in optimizer steps; of an unknown number of samples ``steps`` must be given."""
        return self.steps or self.epochs * ((samples or 0) // self.batch.size)


def fit_batch(
    config: PretrainConfig, train: IndexedDataset | StreamDataset, processes: int
) -> tuple[PretrainConfig, list[str]]:
    """A batch that the images are enough for: the largest one below that is shared evenly by processes and micro-batches.

    Returns:
        The configuration with that batch, and what is to be said of it.
    """
    batch, samples = config.batch, known_length(train)
    if samples is None or batch.size <= samples:
        return config, []
    micro = batch.micro if batch.micro is not None and batch.micro * processes <= samples else None
    unit = (micro or 1) * processes
    size = samples // unit * unit
    if size < 2 * processes:
        return config, []  # `check` refuses it
    dropped = f", and batch.micro={batch.micro} is more than a process has and left out" if micro != batch.micro else ""
    note = f"batch.size={size} instead of {batch.size}: {train.name} has only {samples} images to train on{dropped}"
    return config.model_copy(update={"batch": BatchConfig(size=size, micro=micro)}), [note]


def check(config: PretrainConfig, train: IndexedDataset | StreamDataset, processes: int) -> None:
    """What can't go together, all of it at once, before anything is written.

    Raises:
        ConfigError: naming each impossible pair.
    """
    problems = []
    size, samples = config.batch.size, known_length(train)
    total = config.total_steps(samples)
    if samples is None and config.steps is None:
        problems.append(f"how long {train.name} is nobody knows: give the run's length by `steps`, or `data.length`.")
    elif samples is not None and size > samples:
        problems.append(
            f"{train.name} has only {samples} images to train on, and each of {processes} process(es) needs 2 in a step: give more."
        )
    elif config.optim.warmup.steps(total if samples is None else samples // size, total) > total:
        problems.append(f"`optim.warmup` of {config.optim.warmup} is longer than the run of {total} steps.")
    if size % processes:
        problems.append(f"`batch.size` of {size} can't be shared evenly by {processes} processes: take a multiple.")
    elif config.batch.micro is not None and size // processes % config.batch.micro:
        problems.append(
            f"`batch.micro` of {config.batch.micro} does not divide the {size // processes} images of a process: take a divisor."
        )
    needed = config.pretext.views_needed
    if needed is not None and config.views.count != needed:
        problems.append(f"`views.count` is {config.views.count}, and {config.pretext.name} needs {needed}.")
    local = config.views.local
    if local.count and not config.pretext.takes_local_views:
        problems.append(
            f"`views.local.count` is {local.count}, and {config.pretext.name} takes no local views: set it to 0."
        )
    if problems:
        raise ConfigError(problems)


def check_local_views(views: ViewsConfig, backbone: Backbone, name: str) -> None:
    """Refuses views of a second size where the backbone is bound to one, before anything is written.

    Raises:
        ConfigError: naming the backbone and its size.
    """
    if views.local.count and backbone.fixed_input not in (None, views.local.size):
        raise ConfigError(
            f"`views.local` needs a backbone that takes images of any size, and {name} is bound to {backbone.fixed_input} px: "
            f"take a convolutional one, or views.local.size={backbone.fixed_input}."
        )


def build_task(
    config: PretrainConfig,
    blueprint: EncoderSpec,
    views: ViewsConfig,
    train: IndexedDataset | StreamDataset,
    accelerator: Accelerator,
) -> tuple[Encoder, Task, list[str]]:
    """The encoder, the pretext task around it on this process's device, and what is to be said of them."""
    torch.manual_seed(derive_seed(config.seed, "initialisation"))
    encoder, notes = blueprint.build()
    check_local_views(views, encoder.backbone, config.backbone.name)
    task = config.pretext.build(encoder, train)
    check_shardable(task, config.batch.micro, accelerator)
    share = dist_info(accelerator)
    if share.device.type == "cpu":
        shapes, own = views.shapes(blueprint.channels), config.batch.size // share.processes
        check_memory(task, shapes, own, config.batch.micro, config.optim.name, processes_here(share.processes))
    return encoder, move_to_device(task, share), [*notes, *batchnorm_notes(task, share)]


@dataclass(frozen=True)
class RunState:
    """Where a run is kept, and what of it is there already.

    Attributes:
        run: its open folder; None in all processes but the main one.
        folder: the same on all of them.
        checkpoints: states to continue from.
        best: keeps the encoder that scores best on ``dev``.
        resume: the state to continue from; None for a start from nothing.
        start: the steps that it has done.
    """

    run: Run | None
    folder: Path
    checkpoints: Checkpoints
    best: BestEncoder
    resume: dict[str, Any] | None
    start: int


def open_run_state(
    config: PretrainConfig, data: dict[str, str], batches: IndexedLoader | StreamLoader, accelerator: Accelerator
) -> RunState:
    """Makes or continues the run's folder, and sets the batches to where it goes on.

    Args:
        config: of the run.
        data: fingerprints of what it learns from and is measured on, by name.
        batches: of the run, from its start.
        accelerator: gives the processes, which all continue from the same step.
    """
    in_steps = config.steps is not None

    def check_change(folder: Path) -> None:
        state = Checkpoints(folder / "checkpoints", main=False).load()
        if state is not None:
            check_steps_left(state, batches, in_steps, "steps" if in_steps else "epochs")

    run = run_on_main(
        accelerator,
        lambda: open_run(config.output, "pretrain", config.resume, dump(config), data=data, check_change=check_change),
    )
    with run.closed_on_error() if run else nullcontext():
        every = config.checkpoint_every.on(batches.clock(0)) or None
        folder = broadcast_from_main(accelerator, run.path if run else Path())
        checkpoints = Checkpoints(folder / "checkpoints", every, config.keep_checkpoints, main=run is not None)
        best = BestEncoder(folder / "best", "eval/knn", run is not None, comparable=not (run and run.changes))
        resume = checkpoints.load() if config.resume != "no" else None
        start = int(resume["done"]) if resume else 0
        check_same_start(accelerator, start)
        if resume is not None:
            go_on(resume, batches, in_steps)
    return RunState(run, folder, checkpoints, best, resume, start)


def pretrain(config: PretrainConfig) -> Path:
    """Stage one: pretrains a backbone on images without labels, and returns the run's folder."""
    accelerator = start_accelerator()
    silence_other_ranks(accelerator.is_main_process)
    share = dist_info(accelerator)

    train, dev = open_training(config.data), config.data.open("dev")
    config, notes = fit_batch(config, train, share.processes)
    check(config, train, share.processes)
    views_config, of_views = config.views.for_channels(train.channels)
    notes += of_views
    if isinstance(train, IndexedDataset):
        notes += config.data.shown_by_views(config.views.each(), train.absent_domains)
    expected = weights_input(config.backbone, train.channels, train.mean, train.std)
    mean, std = expected.mean, expected.std
    notes += expected.notes(config.views.size, evaluated=False)
    views = build_views(train, views_config, mean, std, config.seed)
    preprocessing = Preprocessing(config.views.size, mean, std)

    blueprint = EncoderSpec(
        backbone=config.backbone,
        neck=config.neck,
        channels=train.channels,
        size=config.views.size,
        mean=mean,
        std=std,
        range=train.value_range,
    )
    encoder, task, more_notes = build_task(config, blueprint, views_config, train, accelerator)
    optimizer = build_optimizer(config.optim, task, config.batch.size)
    length = config.total_steps(known_length(train))
    batches = build_loader(
        train, views, config.batch.size, config.seed, share, length, config.workers, with_labels=task.reads_labels
    )

    data = {"train": train.fingerprint()} | ({} if dev is None else {"dev": dev.fingerprint()})
    card = partial(encoder_card, config, blueprint, train, data["train"])
    place = open_run_state(config, data, batches, accelerator)
    run, start, total = place.run, place.start, batches.total_steps + batches.offset
    with (
        run or nullcontext(),
        place.checkpoints,
        Progress(
            total,
            start,
            run is not None,
            config.tracking.terminal,
            seconds_before=seconds_before(run.path) if run else 0.0,
        ) as progress,  # fmt: skip
        # A run that starts again from nothing also measures step 0 again.
        open_loggers(run, "pretrain", dump(config), config.tracking, start or -1) as trackers,
        handle_signals(run.path if run else None),
    ):
        progress.say(
            f"pretrain: {config.pretext.name} with {config.backbone.name} on {describe_size(train)} of {train.name}"
        )
        notes += [] if train.value_range is None else [f"of more than 8 bits {describe_range(train.value_range)}"]
        notes += [
            describe_splits(config.data, train, dev),
            *more_notes,
            f"{share.processes} process(es) on {share.device}",
            f"run folder {place.folder}",
        ]
        if run is not None and run.changes and place.resume is not None:
            notes.append(in_words(place.resume, batches, config.optim))
        for note in notes:
            progress.say(f"  {note}")

        looked_at = preview(train)
        evaluation = OnlineEvaluation(looked_at, dev, views, preprocessing, share)
        measure = progress.announcing("measuring the backbone", evaluation)
        untrained = {} if start else measure(encoder)
        if not start and isinstance(train, IndexedDataset):
            read = progress.announcing("reading all images for the task's memory", extract)
            task.prime(lambda forward: read(task, looked_at, preprocessing, share, forward=forward))
        trackers.log(start, {f"untrained/{name.removeprefix('eval/')}": value for name, value in untrained.items()})
        gallery = ImageLogger(trackers)
        if trackers.draws:
            progress.say("  drawing pictures of views and features")
        gallery.views(start, looked_at, config.views, config.seed)
        gallery.evaluation(start, evaluation, must=True)

        def hand_over() -> None:
            if run is not None:
                progress.say(f"wrote {save(place.folder, encoder, card({}))} and card.json")

        watch = OnlineEvalCallback(
            encoder, evaluation, place.best, gallery, card, total, hand_over, share.processes == 1
        )
        alerts = open_alerts("pretrain", encoder.width, progress, trackers, place.folder if run and start else None)
        fit(
            task, batches, config.optim, optimizer, accelerator, place.checkpoints, place.resume,
            progress.announcing("measuring the backbone", watch), config.evaluate_every.on(batches.clock(0)) or total,
            (trackers.log, progress.update, alerts), progress.moved, config.log_every, "pretrain", config.batch.micro,
        )  # fmt: skip
        # A run that was at its end before took no step.
        final = watch.latest if watch.done == total else watch.look(total)
        if run is not None:
            write_card(place.folder, card(final))
            trackers.log_model(place.folder)
            untrained = untrained or untrained_figures(place.folder)
            progress.say_end(final, untrained)
            if told := without_gain(untrained, final, evaluation.knn_images):
                progress.say(told)
    accelerator.wait_for_everyone()
    return place.folder


def encoder_card(
    config: PretrainConfig,
    blueprint: EncoderSpec,
    train: IndexedDataset | StreamDataset,
    fingerprint: str,
    figures: dict[str, float],
) -> Card:
    """What an encoder is."""
    return Card(
        kind="encoder", blueprint=blueprint, config=redact(dump(config)), figures=figures, versions=versions(),
        data={"name": train.name, "fingerprint": fingerprint, "license": train.license},
    )  # fmt: skip


def main() -> None:
    """The command line."""
    install_signal_handlers()
    save_with_launcher()
    with clean_distributed_exit():
        run_command("pretrain", PretrainConfig, pretrain)


if __name__ == "__main__":
    main()
