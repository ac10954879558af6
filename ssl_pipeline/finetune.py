"""Stage two from top to bottom: a pretrained encoder and a few labels go in, a model and its metrics come out."""

from __future__ import annotations

import logging
import shutil
import time
from functools import partial

from accelerate import Accelerator

from ssl_pipeline.config.base import dump
from ssl_pipeline.config.command import run_command
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.domain_split import split_domains
from ssl_pipeline.domain.plan import DomainPlan
from ssl_pipeline.downstream.labels import describe_labels
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.plan import Plan, Start, selection
from ssl_pipeline.downstream.regime import TrainContext
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.engine.distributed import (
    broadcast_from_main,
    dist_info,
    start_accelerator,
)
from ssl_pipeline.engine.failures import command_process
from ssl_pipeline.engine.memory import check_memory, processes_here
from ssl_pipeline.engine.run import Run, start_run
from ssl_pipeline.evaluation.plots import ImageLogger
from ssl_pipeline.evaluation.result import Result, finished_seeds
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.jsonl import seconds_before
from ssl_pipeline.logging.progress import console, duration, print_table
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import versions
from ssl_pipeline.models.build_encoder import build_encoder, check_channels
from ssl_pipeline.models.encoder import Card, finite, save, write_card

__all__ = ["FinetuneConfig", "finetune", "open_plan"]
_log = logging.getLogger("ssl_pipeline")


def finetune(config: FinetuneConfig) -> Result:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    accelerator = start_accelerator()
    config, plan = open_plan(config)
    if accelerator.is_main_process and config.tracking.progress != "quiet":
        labels = describe_labels(plan.pool, plan.held_out, config.split)
        console().print(f"finetune: {labels}", markup=False)
    card = partial(model_card, config, plan)
    seeds = range(config.seed, config.seed + config.seeds)
    labeled = plan.split(config.seed)  # too few labels are refused here, before anything is written
    check_memory_of(plan, len(labeled.train), config.seed, accelerator)
    chosen_by = selection(plan.labels, plan.downstream, plan.regime, labeled)

    with start_run("finetune", config, accelerator, plan.fingerprints(config.split)) as run:
        finished = resume_seeds(run, seeds, config.split, accelerator)
        run.start(max(finished, default=-1))
        run.count_trained(finished)
        result = Result(run.folder, config.split, selection=chosen_by)
        if config.labels.validation == "auto":
            run.say(chosen_by["why"])
        if finished:
            result.take_confusion()
        if config.encoder is not None and not config.starts_fresh:
            run.loggers.use_model(config.encoder)
        for seed in seeds:
            if seed in finished:
                result.figures.append(finished[seed])
                continue
            first = seed == config.seed  # by rule its model is the run's, not the best one's
            context = plan.context(seed, accelerator, run)
            task = plan.train(context)
            if run.main and first:  # before anything is measured, which must not lose it
                save(run.folder, task, card({}))
            run.say(f"seed {seed}, measuring on {len(plan.held_out):,} images of {config.split}")
            metrics = finite(plan.measure(task, context))
            result.figures.append(metrics)
            if first:
                log_confusion(result, plan, task, context, run)
            if run.main and first:
                write_card(run.folder, card(metrics))
            run.loggers.log(seed, {f"{config.split}/{name}": value for name, value in metrics.items()})
            if run.main:
                shutil.rmtree(run.folder / "checkpoints" / f"seed-{seed}", ignore_errors=True)
        if run.main:
            result.write()
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return result


def open_plan(
    config: FinetuneConfig,
    sources: tuple[IndexedDataset, IndexedDataset | None] | None = None,
    start: Start | None = None,
) -> tuple[FinetuneConfig, Plan]:
    """Opens the images and what is trained, unless they are open already, and checks that all of it goes together.

    Returns:
        The configuration, with the keys that an encoder or model decides, and the plan.

    Raises:
        ConfigError: naming what does not go together, or can't be opened.
    """
    folder = config.domain.starts_from if config.domain is not None else None
    model = None if folder is None else load_model(folder)
    if model is not None:  # its bottleneck and head are those that it was trained with
        config = config.model_copy(update={"downstream": model.config})
    if sources is None:
        config = config.model_copy(update={"data": config.scaled_data})
    pool, held_out = sources or (config.data.open("train"), config.data.open(config.split))
    assert pool is not None
    domains = None
    if config.domain is not None:
        domains = split_domains(config.domain, pool, held_out, None if model is None else model.classes)
        pool = domains.source
    config.check(pool, held_out)
    assert held_out is not None
    if model is not None:
        check_channels(model.card.blueprint, "the model in `domain.model`", pool)
        start = Start(model.card.blueprint, model.task.encoder, model.task)
    start = start or open_start(config, pool)
    views, _ = config.transform.model_copy(update={"size": start.spec.size}).for_channels(pool.channels)
    make = Plan if domains is None else partial(DomainPlan, domains=domains)
    return config, make(
        downstream=config.downstream, regime=config.regime, labels=config.labels, unlabeled=config.unlabeled, views=views,
        pool=pool, held_out=held_out, start=start, workers=config.num_workers,
    )  # fmt: skip


def open_start(config: FinetuneConfig, pool: IndexedDataset) -> Start:
    """What stage two starts from: an architecture and, unless its weights are to be random, its encoder."""
    size = config.size or (config.transform.size if config.encoder is None else None)
    built = build_encoder(config.encoder, config.backbone, config.neck, pool, size)
    for note in built.notes if built.blueprint.backbone.weights is not None else []:
        console().print(note, markup=False)
    return Start(built.blueprint.without_weights(), None if config.starts_fresh else built.encoder)


def check_memory_of(plan: Plan, images: int, seed: int, accelerator: Accelerator) -> None:
    """Refuses, on a CPU, what its memory is not enough for, with a smaller batch to take."""
    share = dist_info(accelerator)
    if share.device.type != "cpu" or not plan.regime.trains_all or plan.start.task is not None:
        return
    views, images = plan.views.shapes(plan.start.spec.channels), min(plan.regime.batch_size, images) // share.processes
    check_memory(
        plan.build(seed, accelerator), views, max(1, images), None, plan.regime.optim.name, processes_here(share.processes),
        "regime.batch_size", "size", None,
    )  # fmt: skip


def resume_seeds(run: Run, seeds: range, split: str, accelerator: Accelerator) -> dict[int, dict[str, float]]:
    """The metrics of the seeds that are done; none of a run that has changed, whose seeds make no mean."""
    if run.main and run.changes:
        _log.warning(
            "the configuration or data has changed: all seeds are trained from their start, none is continued."
        )
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    done = finished_seeds(run.folder, seeds, split) if run.main and not run.changes else {}
    return broadcast_from_main(accelerator, done)


def log_confusion(result: Result, plan: Plan, task: DownstreamTask, context: TrainContext, run: Run) -> None:
    """Puts the confusion of classes into the result, keeps it for a run that is stopped, and draws it."""
    matrix, classes = plan.confusion(task, context), plan.pool.classes or ()
    if matrix is None:
        return
    result.confusion.update(classes=list(classes), matrix=matrix.tolist())
    ImageLogger(run.loggers).confusion(context.seed, matrix, classes)
    if run.main:
        result.keep_confusion()


def model_card(config: FinetuneConfig, plan: Plan, metrics: dict[str, float]) -> Card:
    """The card of a model; ``regime=scratch`` alone says that its encoder was not pretrained."""
    settings = redact(dump(config)) | {"init": "random" if config.starts_fresh else "pretrained"}
    pool = plan.pool
    return Card(
        kind="model", blueprint=plan.start.spec, config=settings, figures=metrics, versions=versions(), classes=pool.classes,
        data={"name": pool.name, "fingerprint": pool.fingerprint(), "license": pool.license},
    )  # fmt: skip


def finetune_and_tell(config: FinetuneConfig) -> None:
    """Stage two: trains a head, or all layers, on labels, and measures on held-out images."""
    began = time.monotonic()
    result = finetune(config)
    if start_accelerator().is_main_process and config.tracking.progress != "quiet":
        unit = ", in %" if config.downstream.in_percent else ""
        title = f"{config.regime.name} on {config.split}, {config.seeds} seed(s){unit}"
        print_table(title, ["metric", "mean ± 95 %"], result.rows(config.downstream.in_percent))
        seconds = seconds_before(result.folder) + time.monotonic() - began
        console().print(f"{duration(seconds)}; wrote", end=" ")
        console().print(f"{result.folder / 'model.safetensors'}, card.json and results.json")


def main() -> None:
    """The command line."""
    with command_process():
        run_command("finetune", FinetuneConfig, finetune_and_tell)


if __name__ == "__main__":
    main()
