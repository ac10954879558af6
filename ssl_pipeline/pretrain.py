"""Stage one from top to bottom: images without labels go in, a backbone comes out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from ssl_pipeline.config.base import dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.build import build_loader, build_views
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.source import describe_range_of, describe_splits, open_training
from ssl_pipeline.engine.checkpoint import describe_resume
from ssl_pipeline.engine.distributed import batchnorm_notes, dist_info, move_to_device, start_accelerator
from ssl_pipeline.engine.failures import command_process
from ssl_pipeline.engine.fsdp import check_shardable
from ssl_pipeline.engine.loop import fit
from ssl_pipeline.engine.memory import check_memory, processes_here
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.engine.run import start_run
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.evaluation.online import Alerts, OnlineEvalCallback, OnlineEvaluation
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import versions
from ssl_pipeline.models.encoder import Card, Encoder, EncoderSpec
from ssl_pipeline.models.pretrained_cfg import resolve_cfg
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.preprocessing import Preprocessing

__all__ = ["PretrainConfig", "pretrain"]


def pretrain(config: PretrainConfig) -> Path:
    """Stage one: pretrains a backbone on images without labels, and returns the run's folder."""
    accelerator = start_accelerator()
    share = dist_info(accelerator)

    train, val = open_training(config.data), config.data.open("val")
    config, notes = config.fit_batch(train, share.processes)
    config.check(train, share.processes)

    views_config, of_views = config.transform.for_channels(train.channels)
    expected = resolve_cfg(config.backbone, train.channels, train.mean, train.std)
    notes += [*of_views, *expected.notes(config.transform.size, evaluated=False)]
    if isinstance(train, IndexedDataset):
        notes += config.data.shown_by_views(config.transform.each(), train.absent_domains)
    views = build_views(train, views_config, expected.mean, expected.std, config.seed)
    preprocessing = Preprocessing(config.transform.size, expected.mean, expected.std)

    spec = EncoderSpec(
        backbone=config.backbone, neck=config.neck, channels=train.channels, size=config.transform.size, mean=expected.mean,
        std=expected.std, range=train.value_range,
    )  # fmt: skip
    encoder, task, more_notes = build_task(config, spec, train, accelerator)
    optimizer = build_optimizer(config.optim, task, config.batch_size)
    length, in_steps = config.total_steps(train.length), config.steps is not None
    loader = build_loader(
        train, views, config.batch_size, config.seed, share, length, config.num_workers, with_labels=task.reads_labels
    )

    data = {"train": train.fingerprint()} | ({} if val is None else {"val": val.fingerprint()})
    with start_run("pretrain", config, accelerator, data, loader, in_steps) as run:
        checkpoints, resume = run.checkpoints(loader, in_steps)
        start, total = int(resume["done"]) if resume else 0, loader.total_steps + loader.offset
        # A run that starts again from nothing also measures step 0 again.
        run.start(start or -1, total, checkpoints)
        run.say(
            f"pretrain: {config.pretext.name} with {config.backbone.name} on {train.describe_size()} of {train.name}"
        )
        notes += describe_range_of(config.data, train)
        notes += [describe_splits(config.data, train, val), *more_notes]
        notes += [f"{share.processes} process(es) on {share.device}", f"run folder {run.folder}"]
        if run.changes and resume is not None:
            notes.append(describe_resume(resume, loader, config.optim))
        run.say("\n".join(f"  {note}" for note in notes))

        images = train.preview()
        evaluation = OnlineEvalCallback(
            run, encoder, OnlineEvaluation(images, val, views, preprocessing, share),
            partial(encoder_card, config, spec, train, data["train"]), config.evaluate_every.on(loader.clock(0)) or total, total,
            alone=share.processes == 1,
        )  # fmt: skip
        evaluation.before_training(start, images, config.transform, config.seed)
        if not start and isinstance(train, IndexedDataset):
            read = run.progress.announcing("reading all images for the task's memory", extract)
            task.prime(lambda forward: read(task, images, preprocessing, share, forward=forward))
        state = TrainState(task, optimizer, config.optim, accelerator, checkpoints, resume, config.micro_batch_size)
        callbacks = (run.log_loop(), evaluation, Alerts(run, "pretrain", encoder.width))
        fit(state, loader, callbacks, config.log_every, "pretrain")
        evaluation.finish()
    accelerator.wait_for_everyone()
    return run.folder


def build_task(
    config: PretrainConfig, spec: EncoderSpec, train: ImageDataset, accelerator: Accelerator
) -> tuple[Encoder, Task, list[str]]:
    """The encoder, the pretext task around it on this process's device, and notes for the log.

    Raises:
        ConfigError: they can't be trained so, or not on this machine.
    """
    torch.manual_seed(derive_seed(config.seed, "initialisation"))
    encoder, notes = spec.build()
    config.check_local_views(encoder.backbone)
    task = config.pretext.build(encoder, train)
    if accelerator.is_fsdp2:
        check_shardable(task, config.micro_batch_size)
    share = dist_info(accelerator)
    if share.device.type == "cpu":
        views, images = config.transform.for_channels(spec.channels)[0], config.batch_size // share.processes
        processes = processes_here(share.processes)
        check_memory(task, views.shapes(spec.channels), images, config.micro_batch_size, config.optim.name, processes)
    return encoder, move_to_device(task, share), [*notes, *batchnorm_notes(task, share)]


def encoder_card(
    config: PretrainConfig, spec: EncoderSpec, train: ImageDataset, fingerprint: str, metrics: dict[str, float]
) -> Card:
    """The card of an encoder."""
    return Card(
        kind="encoder", blueprint=spec, config=redact(dump(config)), figures=metrics, versions=versions(),
        data={"name": train.name, "fingerprint": fingerprint, "license": train.license},
    )  # fmt: skip


def main() -> None:
    """The command line."""
    with command_process():
        run_command("pretrain", PretrainConfig, pretrain)


if __name__ == "__main__":
    main()
