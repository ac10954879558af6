"""The plan of a method across domains, and how the method trains: its phases one after the other, by the one loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.domain.domain_split import DomainSplit
from ssl_pipeline.domain.method import Method, MethodConfig, Phase, SourceTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.downstream.regime import Best, RegimeConfig, TrainContext, TrainingConfig, fit_linear_probe, run_loop
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.multi_view import Views


@dataclass(frozen=True, kw_only=True)
class DomainPlan(Plan):
    """Labels of the sources teach, the target's images are there without labels, and each domain is measured.

    Attributes:
        domains: which images those are, and the method.
    """

    domains: DomainSplit

    def split(self, seed: int) -> LabeledSplit:
        return self.domains.draw(self.labels, self.downstream, seed)

    def train(self, context: TrainContext) -> Classification:
        task = self.build(context.seed, context.accelerator)
        assert isinstance(task, Classification)  # a method's `check` allows no other
        train_across(self.domains.method, self.regime, task, self.domains.target, context)
        return task

    def measure(self, task: DownstreamTask, context: TrainContext) -> dict[str, float]:
        assert isinstance(task, Classification)
        return self.domains.evaluate(task, context.labeled, context.preprocessing, context.share)

    def confusion(self, task: DownstreamTask, context: TrainContext) -> None:
        """None: each domain's accuracies are measured instead."""

    def fingerprints(self, split: str) -> dict[str, str]:
        return super().fingerprints(split) | {"target": self.domains.target.fingerprint()}


def train_across(
    method: MethodConfig,
    regime: RegimeConfig,
    classifier: Classification,
    target: IndexedDataset,
    context: TrainContext,
) -> None:
    """Trains a classifier in place.

    Args:
        method: across domains.
        regime: where the head starts, and how long and at which rate all layers train.
        classifier: on its device.
        target: its training images, without labels.
        context: the labeled images and what they are trained with.
    """
    labeled, share = context.labeled, context.share
    has_source = method.starts_from is None
    if has_source:
        classifier.look_at(labeled.train)
    regime.apply_to(classifier)
    if regime.probes and has_source:
        fit_linear_probe(regime, classifier, context)
    task = method.build(classifier, target).to(share.device)
    for phase in method.phases:
        if phase == "target":
            _run_phase(phase, method, regime, method.on_target, task, target, context)
        elif regime.trains_all and has_source:
            stage = SourceTask(method, classifier) if "target" in method.phases else task
            _run_phase(phase, method, regime, regime, stage, target, context)
    task.finish(labeled.train, target, context.preprocessing, share)


def _run_phase(
    phase: Phase,
    method: MethodConfig,
    regime: RegimeConfig,
    training: TrainingConfig,
    task: Method,
    target: IndexedDataset,
    context: TrainContext,
) -> None:
    share, labeled = context.share, context.labeled
    images = target if phase == "target" else labeled.train
    # As even as an epoch allows, and of a joint batch no side may be asked for more than it has.
    most = min(regime.batch_size, len(target)) if phase == "joint" else regime.batch_size
    size = max(len(images) // math.ceil(len(images) / most) // share.processes, 1) * share.processes
    total = max(1, training.min_steps, training.length.steps(len(images) // size, 0))
    # Sample i of the target is not to be cropped as sample i of the source is.
    preprocessing = context.preprocessing
    target_views = Views(
        context.views.config, preprocessing.mean, preprocessing.std, derive_seed(context.views.seed, "target")
    )
    loader: IndexedLoader
    if phase == "joint":
        loader = PairedLoader(
            images, target, context.views, target_views, size, context.seed, share, total, context.workers
        )
    else:
        views = target_views if phase == "target" else context.views
        loader = IndexedLoader(
            images, views, size, context.seed, share, total, context.workers, with_labels=task.reads_labels
        )
    task.prime(lambda forward: extract(task, target, context.preprocessing, share, forward=forward))
    # The held-out labels also measure (``source_validation``): no probe is fitted to them, whichever step is kept.
    chooses = method.selects and labeled.validation is not None
    best = Best(task.classifier, context, starts_trained=regime.probes) if chooses else None
    if best is not None:
        best.evaluate_every = max(1, total // 20)
    run_loop(training, task, loader, context, phase, best)
