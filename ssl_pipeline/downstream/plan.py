"""Stage two's plan: what is labeled, what is measured, what it starts from, and who trains; resolved once for all seeds."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.consistency import ConsistencyConfig, UnlabeledImages
from ssl_pipeline.downstream.labels import LabeledSplit, LabelsConfig, draw, unlabeled_pool
from ssl_pipeline.downstream.pooled_task import PooledTask, targets_of
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

    def digest(self) -> str | None:
        """Of the weights; None where they are fresh."""
        weights = self.task or self.encoder
        return None if weights is None else digest(weights)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a training on labels; methods across domains have one of their own (:mod:`ssl_pipeline.domain.plan`).

    Attributes:
        downstream: what the labels are for.
        regime: which layers are trained, and how.
        labels: how many are used, and how many of them are held out.
        unlabeled: how other images are learned from without labels; None leaves them alone.
        views: of training images, for their channels and the encoder's size.
        pool: the images with labels.
        held_out: the images to measure on.
        start: what each seed starts from.
        workers: processes that decode files; None chooses by the machine's cores.
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
        """The labeled images that a seed learns from, and those of them that are held out.

        Raises:
            ConfigError: there are too few labels.
        """
        return draw(self.labels, self.downstream, self.pool, seed)

    def context(
        self, seed: int, accelerator: Accelerator, run: Run | None = None, features: CachedFeatures | None = None
    ) -> TrainContext:
        """What a seed is trained with.

        Args:
            seed: of label draw, head, order and views.
            accelerator: gives precision and processes.
            run: keeps checkpoints and logs; None does neither.
            features: of the encoder, where they were extracted before.
        """
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
        torch.manual_seed(derive_seed(seed, "initialisation"))
        encoder = copy.deepcopy(start.encoder) if start.encoder is not None else start.spec.build()[0]
        return move_to_device(self.downstream.build(encoder, len(self.pool.classes or ())), share)

    def train(self, context: TrainContext) -> DownstreamTask:
        """Builds and trains a seed's task."""
        task = self.build(context.seed, context.accelerator)
        train(self.regime, task, context)
        return task

    def measure(self, task: DownstreamTask, context: TrainContext) -> dict[str, float]:
        """The metrics of a trained task on held-out images."""
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
