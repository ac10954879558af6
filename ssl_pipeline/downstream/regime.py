"""How stage two trains: a probe on fixed features, all layers, or first one and then the other.

Linear probing first keeps fine-tuning from distorting the features while the head is still random (Kumar et al. 2022).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.data.build import AnnotatedLoader
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.consistency import Consistency, UnlabeledImages
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.pooled_task import PooledTask, Rows, choose_decay, first_metric, targets_of
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.engine.distributed import broadcast_from_main, dist_info
from ssl_pipeline.engine.loop import Callback, fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.run import Run
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.evaluation.features import evaluating
from ssl_pipeline.models.bottleneck import estimate_bottleneck
from ssl_pipeline.schedules import Duration, TrainProgress, parse_duration
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


class TrainingConfig(FrozenModel):
    """A training by the loop.

    Attributes:
        length: of the training.
        min_steps: and at least so many steps: few labels make short epochs.
        optim: the optimizer and its rate.
    """

    length: Duration = parse_duration("30 epochs")
    min_steps: int = Field(0, ge=0)
    optim: OptimConfig = OptimConfig()

    def steps(self, images: int, batch_size: int, processes: int) -> tuple[int, int]:
        """Samples of a step, as even as an epoch allows, and the number of steps."""
        size = max(images // math.ceil(images / batch_size) // processes, 1) * processes
        return size, max(1, self.min_steps, self.length.steps(images // size, 0))


class RegimeConfig(TrainingConfig):
    """A regime. ``length``, ``min_steps`` and ``optim`` are for the training of all layers.

    Attributes:
        name: ``frozen``: the probe alone. ``lp_ft``: the probe, then all layers. ``end_to_end``: all layers from a
            random head. ``scratch``: all layers, the encoder random too.
        weight_decays: the probe's weight decays to choose from, on held-out labels or by cross-validation; the first one where ``labels.validation``
            is 0.
        probe: how a head that can't be solved is trained on the frozen encoder.
        batch_size: samples of a step, or a little fewer so that an epoch leaves few labels out.
        backbone_lr_factor: the encoder's share of the learning rate.
        layer_decay: what a layer's rate is of that of the layer after it; below 1, deeper layers learn faster.
        freeze_bn_stats: whether the encoder's BatchNorms use stage one's running statistics, and keep them, rather than each batch's.
            For encoders that saw more domains than there are labels of: the labeled domains' statistics would replace those of all.
    """

    name: Literal["frozen", "lp_ft", "end_to_end", "scratch"] = "lp_ft"
    weight_decays: tuple[float, ...] = Field((0.1, 0.001, 0.01, 1.0), min_length=1)
    probe: TrainingConfig = TrainingConfig(optim=OptimConfig(name="adamw", lr=0.002, scaling="none"))
    batch_size: int = Field(64, ge=2)
    backbone_lr_factor: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    freeze_bn_stats: bool = False

    @property
    def probes(self) -> bool:
        """Whether the head is first fitted on fixed features."""
        return self.name in ("frozen", "lp_ft")

    @property
    def trains_all(self) -> bool:
        return self.name != "frozen"

    def apply_to(self, task: DownstreamTask) -> None:
        task.backbone_lr_factor, task.layer_decay = self.backbone_lr_factor, self.layer_decay
        task.encoder.keeps_statistics = self.freeze_bn_stats


@dataclass(frozen=True)
class CachedFeatures:
    """Features of the images to learn from, those that choose, and those to measure on, extracted before."""

    train: Rows
    validation: Rows | None = None
    held_out: Rows | None = None


@dataclass(frozen=True)
class TrainContext:
    """What one seed is trained with. Without ``workers`` the machine's cores decide, without a ``run`` nothing is kept or logged."""

    labeled: LabeledSplit
    views: Views
    preprocessing: Preprocessing
    seed: int
    accelerator: Accelerator
    workers: int | None = None
    run: Run | None = None
    features: CachedFeatures | None = None
    unlabeled: UnlabeledImages | None = None

    @property
    def share(self) -> DistInfo:
        return dist_info(self.accelerator)


def train(regime: RegimeConfig, task: DownstreamTask, context: TrainContext) -> None:
    """Trains a task in place by a regime; training labels that are held out select, or none do.

    A training that was stopped repeats its steps: a head is solved again, to the same bits, and a loop continues from its last
    checkpoint, or from its end.

    Raises:
        ConfigError: there are fewer labeled samples than processes.
    """
    task.look_at(context.labeled.train)
    regime.apply_to(task)
    on_all_labels: Callable[[], None] | None = None
    if regime.probes and isinstance(task, PooledTask):
        on_all_labels = fit_linear_probe(regime, task, context)
        if not regime.trains_all and on_all_labels is not None:
            on_all_labels()
    elif regime.probes:
        task.fix_encoder(True)
        _train_on_labels(regime.probe, regime.batch_size, task, context, "probe", Best(task, context))
        task.fix_encoder(False)
    if regime.trains_all:
        best = Best(task, context, starts_trained=regime.probes, on_all_labels=on_all_labels)
        _train_on_labels(regime, regime.batch_size, task, context, "all_layers", best)


def fit_linear_probe(regime: RegimeConfig, task: PooledTask, context: TrainContext) -> Callable[[], None] | None:
    """Fits the head on fixed features, with a weight decay chosen by held-out labels, or by cross-validation.

    A bottleneck has random weights, and gets the statistics that fit them and the features first.

    Returns:
        What fits the head again, on the held-out labels too, once they have nothing left to choose; None where none are held out.
    """
    labeled, device, cached = context.labeled, context.share.device, context.features

    def features_of(images: IndexedDataset) -> Rows:
        return task.read(images, context.preprocessing, context.share, task.encoder.features)

    @torch.no_grad()
    def behind_bottleneck(rows: Rows) -> Rows:
        rows = rows.to(device)
        return Rows(task.through_bottleneck(rows.features), rows.targets, rows.index)

    train = features_of(labeled.train) if cached is None else cached.train
    held_out = None if cached is None else cached.validation
    if held_out is None and labeled.validation is not None:
        held_out = features_of(labeled.validation)
    with evaluating(task):
        estimate_bottleneck(task.bottleneck, train.features.to(device))
        train, held_out = behind_bottleneck(train), held_out and behind_bottleneck(held_out)
    folds = None if labeled.folds is None else labeled.folds[train.index]
    decay = broadcast_from_main(context.accelerator, choose_decay(task, regime.weight_decays, train, held_out, folds))

    def fit_on(*parts: Rows) -> None:
        features, targets = (torch.cat([getattr(part, side) for part in parts]) for side in ("features", "targets"))
        task.fit_head(features, targets, decay)

    fit_on(train)
    return None if held_out is None else lambda: fit_on(train, held_out)


def _train_on_labels(
    training: TrainingConfig, batch_size: int, task: DownstreamTask, context: TrainContext, name: str, best: Best
) -> None:
    labeled, share, unlabeled, labels = context.labeled, context.share, context.unlabeled, len(context.labeled.train)
    if labels < share.processes:
        raise ConfigError(
            f"{labels} labeled image(s) can't be shared by {share.processes} processes: start at most {labels}, or use more labels."
        )
    if unlabeled is not None:
        batch_size = min(batch_size, len(unlabeled.images) // unlabeled.config.ratio)
    size, total = training.steps(labels, batch_size, share.processes)
    learner: Task = task
    loader: IndexedLoader
    if unlabeled is not None:
        assert isinstance(task, Classification)  # finetune's `check` allows no other
        loader = PairedLoader(
            labeled.train, unlabeled.images, context.views, unlabeled.views, size, context.seed, share, total, context.workers,
            unlabeled.config.ratio * size,
        )  # fmt: skip
        learner = Consistency(unlabeled.config, task, targets_of(labeled.train)).to(share.device)
    else:
        make = IndexedLoader if labeled.train.annotations is None else AnnotatedLoader
        loader = make(labeled.train, context.views, size, context.seed, share, total, context.workers, with_labels=True)
    best.evaluate_every = max(loader.steps_per_epoch, loader.total_steps // 20)
    run_loop(training, learner, loader, context, name, best if labeled.validation is not None else None)


def run_loop(
    training: TrainingConfig,
    task: Task,
    loader: IndexedLoader,
    context: TrainContext,
    name: str,
    best: Best | None = None,
) -> None:
    """One loop, ``name`` among those of a training, continued where it was stopped; ``best`` puts the best weights back at its end."""
    optimizer, run = build_optimizer(training.optim, task, loader.batch_size), context.run
    checkpoints, resume = None, None
    if run is not None:
        in_steps = training.length.unit == "steps"
        checkpoints, resume = run.checkpoints(loader, in_steps, f"seed-{context.seed}/{name}")
    total, done = loader.total_steps + loader.offset, int(resume["done"]) if resume is not None else 0
    log = run.logging(context.seed, name, total, done) if run is not None else nullcontext((Callback(), total))
    with checkpoints or nullcontext(), log as (logger, log_every):
        state = TrainState(task, optimizer, training.optim, context.accelerator, checkpoints, resume)
        fit(state, loader, (logger,) if best is None else (best, logger), log_every, prefix="finetune")
    if best is not None:
        best.restore()
    context.accelerator.free_memory()


class Best(Callback):
    """Keeps the weights that score best on held-out labels; the latest of equals, as few labels make many of them.

    With ``starts_trained`` the weights that the loop starts from, a probe's, are a candidate too. If they are the best,
    ``on_all_labels`` fits the probe's head again, on the held-out labels too: they were judged by a head that had not seen them.
    """

    def __init__(
        self,
        task: DownstreamTask,
        context: TrainContext,
        starts_trained: bool = False,
        on_all_labels: Callable[[], None] | None = None,
    ) -> None:
        self._task, self._context = task, context
        self._starts_trained, self._on_all_labels = starts_trained, on_all_labels
        self._value, self._state, self._is_start = float("-inf"), dict[str, Any](), False

    def on_train_start(self, resume: Mapping[str, Any] | None) -> None:
        if resume is not None:
            best = resume["best"]
            self._value, self._state, self._is_start = best["value"], best["state"], best["is_start"]
        elif self._starts_trained:
            self._measure(is_start=True)

    def evaluate(self, progress: TrainProgress) -> Mapping[str, float]:
        """The metrics on held-out labels; keeps the weights if none before were better."""
        del progress
        return {f"finetune/validation_{name}": value for name, value in self._measure(is_start=False).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"best": {"value": self._value, "state": self._state, "is_start": self._is_start}}

    def restore(self) -> None:
        if self._state:
            self._task.load_state_dict(self._state)
        if self._is_start and self._on_all_labels is not None:
            self._on_all_labels()

    def _measure(self, is_start: bool) -> dict[str, float]:
        held_out, context = self._context.labeled.validation, self._context
        assert held_out is not None
        figures = self._task.evaluate(held_out, context.preprocessing, context.share)
        if first_metric(figures) >= self._value:
            self._value, self._is_start = first_metric(figures), is_start
            self._state = copy.deepcopy(self._task.state_dict())
        return figures
