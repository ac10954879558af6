"""The plan of a method across domains, and how the method trains: its phases one after the other, by the one loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.domain.domain_split import DomainSplit
from ssl_pipeline.domain.method import Method, MethodConfig, Phase, SourceTask
from ssl_pipeline.domain.metrics import open_set_metrics, proxy_a_distance, unlabeled_metrics
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.downstream.pooled_task import Rows
from ssl_pipeline.downstream.regime import Best, RegimeConfig, TrainContext, TrainingConfig, fit_linear_probe, run_loop
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.evaluation.features import evaluating, extract
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


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
        return measure_across(self.domains, task, context.labeled, context.preprocessing, context.share)

    def confusion(self, task: DownstreamTask, context: TrainContext) -> None:
        """None: each domain's accuracies are measured instead."""

    def fingerprints(self, split: str) -> dict[str, str]:
        return super().fingerprints(split) | {"target": self.domains.target.fingerprint()}


@torch.no_grad()
def measure_across(
    domains: DomainSplit, task: Classification, learned: LabeledSplit, preprocessing: Preprocessing, share: DistInfo
) -> dict[str, float]:
    """Accuracy on the targets together, per domain, and per class of the targets; the worst target where there are several.

    Beside it the metrics of ``domain.metrics``: those that need no label of the target, the distance of source and target
    where both have held-out images, and with ``known`` how well unknown classes are found.
    """

    def read(images: IndexedDataset) -> Rows:
        return task.read(images, preprocessing, share)

    rows = {name: read(images) for name, images in domains.measured.items()}
    labels = {name: found.targets for name, found in rows.items()}
    logits = {n: task.of_features(r.features.to(share.device)).float().cpu() for n, r in rows.items()}
    predictions, truth = (torch.cat([side[name] for name in domains.targets]) for side in (logits, labels))
    found = task.score(predictions, truth)
    accuracies = {name: task.score(logits[name], labels[name])["accuracy"] for name in rows}
    if len(domains.targets) > 1:
        found["worst_domain_accuracy"] = min(accuracies[name] for name in domains.targets)
    found |= {f"accuracy/{name}": value for name, value in accuracies.items()}
    right = (predictions.argmax(1) == truth).float()
    classes = domains.source.classes or ()
    found |= {f"class_accuracy/{classes[c]}": float(right[truth == c].mean()) for c in truth.unique().tolist()}
    found |= unlabeled_metrics(task, domains.target, learned.validation, preprocessing, share)
    sides = [
        [r.features for n, r in rows.items() if (n in domains.targets) == is_target] for is_target in (False, True)
    ]
    if all(sum(map(len, side)) > 1 for side in sides):
        found["label_free/proxy_a_distance"] = proxy_a_distance(*map(torch.cat, sides))
    if domains.unknown is not None:
        held_out = None if learned.validation is None else read(learned.validation)
        unknown, taught = read(domains.unknown), read(learned.train)
        with evaluating(task):
            found |= open_set_metrics(task, taught, held_out, rows, domains.targets, unknown, share.device)
    return found


def train_across(
    method: MethodConfig,
    regime: RegimeConfig,
    classifier: Classification,
    target: IndexedDataset,
    context: TrainContext,
) -> None:
    """Trains a classifier in place, from a context's labeled images and a target's without labels; its head starts as the regime says."""
    has_source = method.starts_from is None
    if has_source:
        classifier.look_at(context.labeled.train)
    regime.apply_to(classifier)
    if regime.probes and has_source:
        fit_linear_probe(regime, classifier, context)
    task = method.build(classifier, target).to(context.share.device)
    for phase in method.phases:
        if phase == "target":
            _run_phase(phase, task, method.target_phase, regime, target, context)
        elif regime.trains_all and has_source:
            stage = SourceTask(method, classifier) if "target" in method.phases else task
            _run_phase(phase, stage, regime, regime, target, context)
    task.finish(target, context)


def _run_phase(
    phase: Phase, task: Method, training: TrainingConfig, regime: RegimeConfig, target: IndexedDataset, context: TrainContext
) -> None:  # fmt: skip
    share, labeled, preprocessing = context.share, context.labeled, context.preprocessing
    images = target if phase == "target" else labeled.train
    # Of a joint batch no side may be asked for more than it has.
    most = min(regime.batch_size, len(target)) if phase == "joint" else regime.batch_size
    size, total = training.steps(len(images), most, share.processes)
    # Sample i of the target is not to be cropped as sample i of the source is.
    seed = derive_seed(context.views.seed, "target")
    target_views = Views(context.views.config, preprocessing.mean, preprocessing.std, seed)
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
    task.prime(lambda forward: extract(task, target, preprocessing, share, forward=forward))
    # The held-out labels also measure (``source_validation``): no probe is fitted to them, whichever step is kept.
    best = Best(task.classifier, context, starts_trained=regime.probes)
    best.evaluate_every = max(1, total // 20)
    chooses = task.config.selects and labeled.validation is not None
    run_loop(training, task, loader, context, phase, best if chooses else None)
