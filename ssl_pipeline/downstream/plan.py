"""Stage two's plan: what is labeled, what chooses, what is measured, and what it starts from; resolved once for all seeds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.consistency import ConsistencyConfig, UnlabeledImages
from ssl_pipeline.downstream.labels import (
    LEAST_HELD_OUT,
    SHARE_HELD_OUT,
    LabeledSplit,
    LabelsConfig,
    draw,
    unlabeled_pool,
)
from ssl_pipeline.downstream.pooled_task import PooledConfig, PooledTask, targets_of
from ssl_pipeline.downstream.regime import CachedFeatures, RegimeConfig, TrainContext, train
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.engine.distributed import dist_info, move_to_device
from ssl_pipeline.engine.run import Run
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.metrics.classification import confusion_matrix
from ssl_pipeline.models.encoder import Encoder, EncoderSpec
from ssl_pipeline.models.weights import digest
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class Start:
    """What stage two starts from.

    Attributes:
        spec: the encoder's architecture, and how images must look.
        encoder: with its weights; None for fresh ones.
        task: a finished model that is trained further, head included; None for a new head.
    """

    spec: EncoderSpec
    encoder: Encoder | None = None
    task: DownstreamTask | None = None

    def new_encoder(self, seed: int) -> Encoder:
        """A copy of the encoder, or one whose fresh weights the seed decides."""
        torch.manual_seed(derive_seed(seed, "initialisation"))
        return copy.deepcopy(self.encoder) if self.encoder is not None else self.spec.build()[0]

    def digest(self) -> str | None:
        weights = self.task or self.encoder
        return None if weights is None else digest(weights)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a training on labels; methods across domains have one of their own (:mod:`ssl_pipeline.domain.plan`).

    Attributes:
        views: of training images, for their channels and the encoder's size.
        pool: the images with labels.
        held_out: the images to measure on.
        start: what each seed starts from.
    """

    downstream: DownstreamConfig
    regime: RegimeConfig
    labels: LabelsConfig
    unlabeled: ConsistencyConfig | None
    views: ViewsConfig
    pool: IndexedDataset
    held_out: IndexedDataset
    start: Start
    workers: int | None = None

    def split(self, seed: int) -> LabeledSplit:
        return draw(self.labels, self.downstream, self.pool, seed)

    def context(
        self, seed: int, accelerator: Accelerator, run: Run | None = None, features: CachedFeatures | None = None
    ) -> TrainContext:
        """What a seed is trained with: it decides label draw, head, order and views."""
        spec, unlabeled = self.start.spec, None
        if self.unlabeled is not None:
            config, _ = self.unlabeled.transform.model_copy(update={"size": spec.size}).for_channels(self.pool.channels)
            images = self.unlabeled.open(self.pool.channels)
            images = images or unlabeled_pool(self.labels, self.downstream, self.pool, seed)
            views = Views(config, spec.mean, spec.std, derive_seed(seed, "unlabelled"))
            unlabeled = UnlabeledImages(self.unlabeled, images, views)
        return TrainContext(
            self.split(seed), Views(self.views, spec.mean, spec.std, seed), Preprocessing.of(spec), seed, accelerator,
            self.workers, run, features, unlabeled,
        )  # fmt: skip

    def build(self, seed: int, accelerator: Accelerator) -> DownstreamTask:
        """A seed's task on this process's device, around a copy of what it starts from."""
        share, start = dist_info(accelerator), self.start
        if start.task is not None:
            return move_to_device(copy.deepcopy(start.task), share)
        return move_to_device(self.downstream.build(start.new_encoder(seed), len(self.pool.classes or ())), share)

    def train(self, context: TrainContext) -> DownstreamTask:
        task = self.build(context.seed, context.accelerator)
        train(self.regime, task, context)
        return task

    def measure(self, task: DownstreamTask, context: TrainContext) -> dict[str, float]:
        cached = None if context.features is None or self.regime.trains_all else context.features.held_out
        if cached is not None and isinstance(task, PooledTask):
            return task.evaluate_features(cached.features, cached.targets)
        return task.evaluate(self.held_out, context.preprocessing, context.share)

    def confusion(self, task: DownstreamTask, context: TrainContext) -> Tensor | None:
        """The confusion matrix on held-out images; None where a task tells no classes."""
        if not isinstance(task, Classification):
            return None
        logits, read = extract_readable(task, self.held_out, context.preprocessing, context.share, forward=task.predict)
        return confusion_matrix(logits.argmax(1), targets_of(self.held_out)[read], len(self.pool.classes or ()))

    def fingerprints(self, split: str) -> dict[str, str]:
        """Of all images and weights, by name; ``split`` is that of the held-out images."""
        images = {"train": self.pool, split: self.held_out}
        beside = self.unlabeled.open(self.pool.channels) if self.unlabeled is not None else None
        found = {name: source.fingerprint() for name, source in images.items()}
        found |= {} if beside is None else {"unlabeled": beside.fingerprint()}
        weights = self.start.digest()
        return found if weights is None else found | {"encoder": weights}


def selection(
    labels: LabelsConfig, downstream: DownstreamConfig, regime: RegimeConfig, labeled: LabeledSplit
) -> dict[str, Any]:
    """How many labels are learned from and held out, how many folds a cross-validation has, and why, for ``results.json``."""
    counts = {
        "validation": labels.validation,
        "learned_from": len(labeled.train),
        "held_out": 0 if labeled.validation is None else len(labeled.validation),
        "folds": 0 if labeled.folds is None else int(labeled.folds.max()) + 1,
    }
    return {**counts, "why": _why(labels, downstream, regime, counts)}


def _why(labels: LabelsConfig, downstream: DownstreamConfig, regime: RegimeConfig, counts: dict[str, Any]) -> str:
    learned, held_out, parts = (counts[key] for key in ("learned_from", "held_out", "folds"))
    taught = f"labels: {learned} to learn from, {held_out or 'none'} held out"
    if labels.validation != "auto":
        return f"{taught} (labels.validation={labels.validation:g})."
    if not learned:
        return "labels: none are learned from."
    if not downstream.selects:
        return f"{taught}: {downstream.name} chooses nothing."
    if held_out:
        return f"{taught} to choose by (labels.validation=auto: {LEAST_HELD_OUT} or more can tell settings apart)."
    share = f"{100 * SHARE_HELD_OUT:.0f} % of them would be fewer than {LEAST_HELD_OUT}, too few to choose by"
    clauses, solved = [f"{taught} (labels.validation=auto: {share})."], isinstance(downstream, PooledConfig)
    if regime.probes and solved and len(regime.weight_decays) > 1 and parts:
        clauses.append(f"The probe's weight decay is chosen by {parts}-fold cross-validation.")
    elif regime.probes and solved and len(regime.weight_decays) > 1:
        first = f"the first of regime.weight_decays, {regime.weight_decays[0]:g}: no class has two labels"
        clauses.append(f"The probe's weight decay is {first}.")
    if regime.trains_all or not solved:
        clauses.append("The last step is kept.")
    return " ".join(clauses)
