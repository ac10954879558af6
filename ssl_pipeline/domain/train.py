"""How a method trains: its phases one after the other, by the one loop."""

from __future__ import annotations

import math

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import IndexedLoader, TrainLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.domain.method import Method, MethodConfig, Phase, SourceTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import (
    Best,
    RegimeConfig,
    TrainContext,
    TrainingConfig,
    fit_linear_probe,
    fit_with_checkpoints,
)
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.multi_view import Views


def train_across(
    method: MethodConfig, regime: RegimeConfig, classifier: Classification, target: IndexedDataset, around: TrainContext
) -> None:
    """Trains a classifier in place.

    Args:
        method: across domains.
        regime: where the head starts, and how long and at which rate all layers train.
        classifier: on its device.
        target: its training images, without labels.
        around: the labeled images and what they are trained with.
    """
    labeled, share = around.labeled, around.share
    has_source = method.starts_from is None
    if has_source:
        classifier.look_at(labeled.train)
    regime.settle(classifier)
    if regime.probes and has_source:
        fit_linear_probe(regime, classifier, around)
    task = method.build(classifier, target).to(share.device)
    for phase in method.phases:
        if phase == "target":
            _run_phase(phase, method, regime, method.on_target, task, target, around)
        elif regime.trains_all and has_source:
            stage = SourceTask(classifier) if "target" in method.phases else task
            _run_phase(phase, method, regime, regime, stage, target, around)
    task.finish(labeled.train, target, around.preprocessing, share)


def _run_phase(
    phase: Phase,
    method: MethodConfig,
    regime: RegimeConfig,
    training: TrainingConfig,
    task: Method,
    target: IndexedDataset,
    around: TrainContext,
) -> None:
    share, labeled = around.share, around.labeled
    images = target if phase == "target" else labeled.train
    # As even as an epoch allows, and of a joint batch no side may be asked for more than it has.
    most = min(regime.batch, len(target)) if phase == "joint" else regime.batch
    size = max(len(images) // math.ceil(len(images) / most) // share.processes, 1) * share.processes
    total = max(1, training.least_steps, training.length.steps(len(images) // size, 0))
    # Sample i of the target is not to be cropped as sample i of the source is.
    preprocessing = around.preprocessing
    target_views = Views(
        around.views.config, preprocessing.mean, preprocessing.std, derive_seed(around.views.seed, "target")
    )
    batches: TrainLoader
    if phase == "joint":
        batches = PairedLoader(
            images, target, around.views, target_views, size, around.seed, share, total, around.workers
        )
    else:
        views = target_views if phase == "target" else around.views
        batches = IndexedLoader(
            images, views, size, around.seed, share, total, around.workers, with_labels=task.reads_labels
        )
    task.prime(lambda forward: extract(task, target, around.preprocessing, share, forward=forward))
    optimizer = build_optimizer(training.optim, task, size)
    # The held-out labels also measure (``source_validation``): no probe is fitted to them, whichever step is kept.
    chooses = method.selects and labeled.validation is not None
    best = Best(task.classifier, around, starts_trained=regime.probes) if chooses else None
    fit_with_checkpoints(training, task, batches, optimizer, around, phase, best, max(1, total // 20) if best else 0)
