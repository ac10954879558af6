"""How stage two trains: a probe on fixed features, all layers, or the one and then the other.

Linear probing first keeps fine-tuning from distorting the features while the head is still random (Kumar et al. 2022).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch.optim import Optimizer

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.data.annotated_loader import AnnotatedLoader
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, TrainLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.data.targets import AnnotatedDataset
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.consistency import Consistency, UnlabeledImages
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.probe import choose_decay, first_figure
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.downstream.vector import PooledTask, Rows, targets_of
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.continuing import go_on
from ssl_pipeline.engine.distributed import broadcast_from_main, check_same_start
from ssl_pipeline.engine.fit import fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.logging.training import TrainingCurves
from ssl_pipeline.models.bottleneck import estimate_bottleneck
from ssl_pipeline.schedules import Duration, TrainProgress, parse_duration
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


class TrainingConfig(FrozenModel):
    """A training by the loop.

    Attributes:
        length: of the training.
        least_steps: and at least so many steps: few labels make short epochs.
        optim: the optimizer and its rate.
    """

    length: Duration = parse_duration("30 epochs")
    least_steps: int = Field(0, ge=0)
    optim: OptimConfig = OptimConfig()


class RegimeConfig(TrainingConfig):
    """A regime. ``length``, ``least_steps`` and ``optim`` are for the training of all layers.

    Attributes:
        name: ``frozen``: the probe alone. ``lp_ft``: the probe, then all layers. ``end_to_end``: all layers from a
            random head. ``scratch``: all layers, the encoder random too.
        decays: the probe's weight decays to choose from, on held-out labels or by cross-validation; the first one where ``labels.validation``
            is 0.
        probe: how a head that can't be solved is trained on the encoder as it is.
        batch: samples of a step, or a little fewer so that an epoch leaves few labels out.
        backbone_lr_factor: the encoder's share of the learning rate.
        layer_decay: what a layer's rate is of that of the layer after it; below 1, deeper layers learn faster.
        statistics: ``batch``: the encoder's BatchNorms go by each batch, and their running statistics follow; ``kept``: they go by
            stage one's, which stay. Where stage one saw more domains than there are labels of, the labeled ones' would replace
            those of all.
    """

    name: Literal["frozen", "lp_ft", "end_to_end", "scratch"] = "lp_ft"
    decays: tuple[float, ...] = Field((0.1, 0.001, 0.01, 1.0), min_length=1)
    probe: TrainingConfig = TrainingConfig(optim=OptimConfig(name="adamw", lr=0.002, scaling="none"))
    batch: int = Field(64, ge=2)
    backbone_lr_factor: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    statistics: Literal["batch", "kept"] = "batch"

    @property
    def probes(self) -> bool:
        """Whether the head is first fitted on fixed features."""
        return self.name in ("frozen", "lp_ft")

    @property
    def trains_all(self) -> bool:
        """Whether all layers are trained."""
        return self.name != "frozen"

    def settle(self, task: DownstreamTask) -> None:
        """Tells a task how its encoder is to be trained."""
        task.backbone_lr_factor, task.layer_decay = self.backbone_lr_factor, self.layer_decay
        task.encoder.keeps_statistics = self.statistics == "kept"


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints of one training, which each of its loops has in a folder of its own.

    Attributes:
        folder: of this training.
        every: between two of a loop.
        keep: how many of a loop.
        main: whether this process writes.
    """

    folder: Path
    every: Duration
    keep: int
    main: bool


@dataclass(frozen=True)
class TrainContext:
    """What a regime trains with, the same for probe and training.

    Attributes:
        labeled: the images to learn from.
        views: the random views of a training image.
        preprocessing: what is done to an image without randomness.
        seed: of this training.
        accelerator: gives precision and processes.
        share: this process's share of the work.
        workers: processes that decode files; None settles it by the machine.
        keeping: where and how often the state is kept to continue from; None keeps none.
        curves: hears the loops; None hears nothing.
        features: the encoder's, of the images to learn from and of those held out, where they were taken before.
        unlabeled: images that are learned from without labels while all layers are trained; None takes the labeled ones alone.
    """

    labeled: LabeledSplit
    views: Views
    preprocessing: Preprocessing
    seed: int
    accelerator: Accelerator
    share: DistInfo
    workers: int | None = None
    keeping: CheckpointConfig | None = None
    curves: TrainingCurves | None = None
    features: tuple[Rows, Rows | None] | None = None
    unlabeled: UnlabeledImages | None = None


def train(regime: RegimeConfig, task: DownstreamTask, around: TrainContext) -> None:
    """Trains a task in place by a regime; selection goes by labels that are held out of the training labels, or by none.

    A training that was stopped takes the same way again: a head is solved anew, to the same bits, and a loop goes on from its
    last checkpoint, or from its end.
    """
    task.look_at(around.labeled.train)
    regime.settle(task)
    on_all_labels: Callable[[], None] | None = None
    if regime.probes and isinstance(task, PooledTask):
        on_all_labels = fit_linear_probe(regime, task, around)
        if not regime.trains_all and on_all_labels is not None:
            on_all_labels()
    elif regime.probes:
        task.fix_encoder(True)
        _run_loop(regime.probe, regime.batch, task, around, "probe", Best(task, around))
        task.fix_encoder(False)
    if not regime.trains_all:
        return
    best = Best(task, around, starts_trained=regime.probes, on_all_labels=on_all_labels)
    if around.unlabeled is not None:
        assert isinstance(task, Classification)  # finetune's `check` allows no other
        _run_consistency(regime, task, around, around.unlabeled, best)
    else:
        _run_loop(regime, regime.batch, task, around, "all_layers", best)


def fit_linear_probe(regime: RegimeConfig, task: PooledTask, around: TrainContext) -> Callable[[], None] | None:
    """The probe: fits the head on fixed features, with a weight decay chosen by held-out labels, or by cross-validation.

    A bottleneck has random weights, and gets the statistics that fit them and the features first.

    Returns:
        What fits the head again, on the held-out labels too, once they have nothing left to choose; None where none are held out.
    """
    labeled, device = around.labeled, around.share.device
    train, held_out = around.features or (None, None)
    if train is None:
        train = task.read(labeled.train, around.preprocessing, around.share, task.encoder.features)
    if held_out is None and labeled.validation is not None:
        held_out = task.read(labeled.validation, around.preprocessing, around.share, task.encoder.features)
    was_training = task.training
    task.eval()
    estimate_bottleneck(task.bottleneck, train.features.to(device))
    train, held_out = (
        _behind_bottleneck(task, train.to(device)),
        held_out and _behind_bottleneck(task, held_out.to(device)),
    )
    task.train(was_training)
    folds = None if labeled.folds is None else labeled.folds[train.index]
    decay = broadcast_from_main(around.accelerator, choose_decay(task, regime.decays, train, held_out, folds))

    def fit_on(*parts: Rows) -> None:
        features, targets = (torch.cat([getattr(part, side) for part in parts]) for side in ("features", "targets"))
        task.fit_head(features, targets, decay)

    fit_on(train)
    return None if held_out is None else lambda: fit_on(train, held_out)


@torch.no_grad()
def _behind_bottleneck(task: PooledTask, rows: Rows) -> Rows:
    return Rows(task.through_bottleneck(rows.features), rows.targets, rows.index)


def _run_loop(
    training: TrainingConfig, batch: int, task: DownstreamTask, around: TrainContext, name: str, best: Best
) -> None:
    labeled, share = around.labeled, around.share
    size, total = _steps(training, batch, around)
    make = AnnotatedLoader if isinstance(labeled.train, AnnotatedDataset) else IndexedLoader
    batches = make(labeled.train, around.views, size, around.seed, share, total, around.workers, with_labels=True)
    _run(training, task, batches, around, name, best)


def _run_consistency(
    regime: RegimeConfig, task: Classification, around: TrainContext, unlabeled: UnlabeledImages, best: Best
) -> None:
    """All layers, from labeled images and as many times ``ratio`` others."""
    labeled, ratio = around.labeled, unlabeled.config.ratio
    size, total = _steps(regime, min(regime.batch, len(unlabeled.images) // ratio), around)
    batches = PairedLoader(
        labeled.train, unlabeled.images, around.views, unlabeled.views, size, around.seed, around.share, total, around.workers,
        ratio * size,
    )  # fmt: skip
    learner = Consistency(unlabeled.config, task, targets_of(labeled.train)).to(around.share.device)
    _run(regime, learner, batches, around, "all_layers", best)


def _steps(training: TrainingConfig, batch: int, around: TrainContext) -> tuple[int, int]:
    """Labeled samples of a step, as even as an epoch allows, and the number of steps.

    Raises:
        ConfigError: there are fewer labeled samples than processes.
    """
    labels, processes = len(around.labeled.train), around.share.processes
    if labels < processes:
        raise ConfigError(
            f"{labels} labeled image(s) can't be shared by {processes} processes: start at most {labels}, or use more labels."
        )
    size = max(labels // math.ceil(labels / batch) // processes, 1) * processes
    return size, max(1, training.least_steps, training.length.steps(labels // size, 0))


def _run(
    training: TrainingConfig, learner: Task, batches: TrainLoader, around: TrainContext, name: str, best: Best
) -> None:
    """A loop that keeps the best weights where held-out labels tell them."""
    optimizer = build_optimizer(training.optim, learner, batches.batch_size)
    chooses = around.labeled.validation is not None
    every = max(batches.steps_per_epoch, batches.total_steps // 20) if chooses else 0
    fit_with_checkpoints(training, learner, batches, optimizer, around, name, best if chooses else None, every)


def fit_with_checkpoints(
    training: TrainingConfig,
    task: Task,
    batches: TrainLoader,
    optimizer: Optimizer,
    around: TrainContext,
    name: str,
    best: Best | None,
    evaluate_every: int,
) -> None:
    """One loop with its checkpoints, continued where it was stopped; the best weights are put back at its end.

    Args:
        training: gives the optimizer's schedule.
        task: what is trained.
        batches: what it learns from.
        optimizer: of its parameters.
        around: what it is trained with.
        name: of this loop among those of a training.
        best: keeps the weights that score best; None takes the last ones.
        evaluate_every: steps between two looks of ``best``; 0 for never.
    """
    checkpoints, resume = None, None
    if around.keeping is not None:
        kept = around.keeping
        interval = kept.every.on(batches.clock(0)) or None
        beside = best.state_dict if best is not None else dict[str, Any]
        checkpoints = Checkpoints(kept.folder / name, interval, kept.keep, kept.main, beside=beside)
        resume = checkpoints.load()
        check_same_start(around.accelerator, int(resume["done"]) if resume else 0)
    if resume is not None:
        go_on(resume, batches, in_steps=training.length.unit == "steps")
    if best is not None:
        best.begin() if resume is None else best.load_state_dict(resume)
    total, done = batches.total_steps + batches.offset, int(resume["done"]) if resume is not None else 0
    curves = around.curves
    with (
        checkpoints or nullcontext(),
        curves.loop(around.seed, name, total, done) if curves is not None else nullcontext() as hear,
    ):
        fit(
            task, batches, training.optim, optimizer, around.accelerator, checkpoints, resume,
            evaluate=best.evaluate if best is not None else None, evaluate_every=evaluate_every,
            listeners=(hear.figures,) if hear is not None else (), moved=hear.moved if hear is not None else lambda _: None,
            log_every=curves.log_every(total) if curves is not None else total, prefix="finetune",
        )  # fmt: skip
    if best is not None:
        best.restore()
    around.accelerator.free_memory()


class Best:
    """Keeps the weights that score best on held-out labels; the latest of equals, as few labels make many of them.

    Args:
        task: whose weights.
        around: what it is trained with.
        starts_trained: whether the weights that the loop starts from, a probe's, are a candidate too.
        on_all_labels: fits the probe's head again, on the held-out labels too, if those weights are the best: they were judged by a
            head that had not seen them.
    """

    def __init__(
        self,
        task: DownstreamTask,
        around: TrainContext,
        starts_trained: bool = False,
        on_all_labels: Callable[[], None] | None = None,
    ) -> None:
        self._task, self._around = task, around
        self._starts_trained, self._on_all_labels = starts_trained, on_all_labels
        self._value, self._state, self._is_start = float("-inf"), dict[str, Any](), False

    def begin(self) -> None:
        """Takes the weights before the first step for the best, where they are a candidate."""
        if self._starts_trained:
            self._measure(is_start=True)

    def evaluate(self, clock: TrainProgress) -> Mapping[str, float]:
        """The figures on held-out labels; keeps the weights if none before were better."""
        del clock
        figures = self._measure(is_start=False)
        return {f"finetune/validation_{name}": value for name, value in figures.items()}

    def _measure(self, is_start: bool) -> dict[str, float]:
        held_out, around = self._around.labeled.validation, self._around
        assert held_out is not None
        figures = self._task.evaluate(held_out, around.preprocessing, around.share)
        if first_figure(figures) >= self._value:
            self._value, self._is_start = first_figure(figures), is_start
            self._state = copy.deepcopy(self._task.state_dict())
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"best": {"value": self._value, "state": self._state, "is_start": self._is_start}}

    def load_state_dict(self, resume: Mapping[str, Any]) -> None:
        """Takes it from a checkpoint."""
        best = resume["best"]
        self._value, self._state, self._is_start = best["value"], best["state"], best.get("is_start", False)

    def restore(self) -> None:
        """Puts the best weights back."""
        if self._state:
            self._task.load_state_dict(self._state)
        if self._is_start and self._on_all_labels is not None:
            self._on_all_labels()
