"""Learning from images without labels, beside those with: a confident prediction for a mild view is the label of a strong one.

    p  = align(softmax(teacher(mild view)))           align(p) ∝ p · (share of the class among labels) / (mean of p so far)
    ℓ  = ℓ_labeled + weight · mean(1[max p ≥ confidence] · −log softmax(f(strong view))_argmax p)

FixMatch (Sohn et al. 2020, arXiv 2001.07685), with a moving average of the weights as the teacher (Tarvainen and Valpola 2017, arXiv
1703.01780) and distribution alignment (Berthelot et al. 2020, arXiv 1911.09785). When to use: few labels, and many images of the
same classes without any. A model that is wrong and confident learns its own error: compare on held-out labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.image_files import scan_folder
from ssl_pipeline.data.sources import folder
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings, StepOutput, Task
from ssl_pipeline.losses.gather import all_gather_rows
from ssl_pipeline.models.ema import EMAModel
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views


class ConsistencyConfig(FrozenModel):
    """How a classifier learns from images without labels while all of its layers are trained.

    Attributes:
        path: a folder of images without labels, with all that lies below it; null takes the data's own training images.
        weight: of the unlabeled term.
        confidence: what the teacher's probability of a class must be, so that the image counts as one of it.
        ratio: images without labels in a step, for each labeled one.
        momentum: what is kept of the teacher at each step.
        transform: of the images without labels: the first one is learned from, and the second one, a mild one, is what the teacher sees. Their
            size is the encoder's.
    """

    path: str | None = None
    weight: float = Field(1.0, gt=0)
    confidence: float = Field(0.8, ge=0, le=1)
    ratio: int = Field(3, ge=1)
    momentum: float = Field(0.98, ge=0, lt=1)
    transform: ViewsConfig

    def open(self, channels: int) -> IndexedDataset | None:
        if self.path is None:
            return None
        if channels not in (1, 3):
            raise ConfigError(
                f"`unlabeled.path`: files are read with 1 or 3 channels, and the data has {channels}: set unlabeled.path=null."
            )
        config = folder.Config(name="folder", path=self.path, channels=channels)
        found = scan_folder(existing_folder(self.path, "unlabeled.path"), config.base, config.max_bad_files)
        if len(found.files) < 2:
            raise ConfigError(
                f"`unlabeled.path`: {self.path!r} holds {len(found.files)} images: give a folder of more."
            )
        return found.dataset(config, self.path)

    def check(self, task: str, regime: str, across_domains: bool, data: IndexedDataset) -> list[str]:
        """What it can't be combined with, as sentences; ``data`` are the training images."""
        problems = []
        if task != "classification":
            problems.append(f"`unlabeled` is for downstream=classification, and this is {task}: set unlabeled=null.")
        if regime == "frozen":
            problems.append(
                "`unlabeled` trains all layers, and regime `frozen` the head alone: take another regime, or unlabeled=null."
            )
        if across_domains:
            problems.append(
                "`domain` and `unlabeled` both bring images without labels into a step: take one of them. "
                "`domain=mcc` and others learn from a target without labels."
            )
        if self.transform.num_views != 2 or self.transform.local_views.count:
            problems.append(
                f"`unlabeled.transform` makes {self.transform.total} view(s) of an image, and 2 are needed: the one to learn from and "
                "the teacher's."
            )
        if any(view.amplitude_mix.probability for view in self.transform.each()):
            problems.append("`unlabeled.transform.amplitude_mix` is for stage one: set its probability to 0.")
        try:
            self.transform.for_channels(data.channels, "unlabeled.transform")
            images = self.open(data.channels) or data
        except ConfigError as error:
            return [*problems, *error.problems]
        if self.ratio > len(images) // 2:
            problems.append(
                f"`unlabeled.ratio` is {self.ratio}, and {images.name} has {len(images)} images: take at most {len(images) // 2}."
            )
        return problems


@dataclass(frozen=True)
class UnlabeledImages:
    """Images without labels, how they are learned from, and their views."""

    config: ConsistencyConfig
    images: IndexedDataset
    views: Views


class Consistency(Task):
    """A classifier, and its moving average as the teacher; see the module.

    In a batch (``data.paired``) the first of ``1 + ratio`` equal parts is labeled. The others have two views. ``labels`` are all those
    that are learned from, int64 of shape (N,).
    """

    reads_labels = True
    shares: Tensor
    mean: Tensor
    _seen: Tensor

    def __init__(self, config: ConsistencyConfig, classifier: Classification, labels: Tensor) -> None:
        super().__init__()
        self.config, self.classifier, self.encoder = config, classifier, classifier.encoder
        self.teacher = EMAModel(classifier)
        shares = labels.bincount(minlength=classifier.classes) / len(labels)
        self.register_buffer("shares", shares.to(classifier.class_weight))
        self.register_buffer("mean", self.shares.clone())  # of the teacher's predictions
        self._seen = self.mean

    def embed(self, batch: Batch) -> Embeddings:
        assert isinstance(self.teacher.network, Classification)
        with torch.no_grad():
            taught = self.teacher.network.predict(batch.views[1])
        return {"logits": self.classifier.predict(batch.views[0]), "taught": taught}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        assert batch.label is not None
        labeled = len(batch.label) // (1 + self.config.ratio)
        logits, label = embeddings["logits"].float(), batch.label[:labeled]
        supervised = self.classifier.supervised(logits[:labeled], label)
        with torch.no_grad():
            probabilities = embeddings["taught"].float().softmax(1)
            self._seen = all_gather_rows(probabilities.mean(0, keepdim=True)).mean(0)
            surest, name = F.normalize(probabilities * self.shares / self.mean.clamp_min(1e-6), p=1, dim=1).max(1)
            sure = (surest >= self.config.confidence).float()
        # A teacher's answer that is no number is never sure, and the loss would stay finite while the mean is spoiled.
        sure = torch.where(surest.isnan(), surest, sure)
        term = (sure * F.cross_entropy(logits[labeled:], name, reduction="none")).mean()
        right = (logits[:labeled].argmax(1) == label).float().mean()
        metrics: dict[str, Tensor | float] = {
            "supervised": supervised.detach(), "unlabeled": term.detach(), "sure": sure.mean(), "accuracy": right,
        }  # fmt: skip
        return StepOutput(supervised + self.config.weight * term, metrics)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.classifier.param_groups()

    def after_step(self, batch: Batch) -> None:
        """The averages are updated, from the start no slower than a plain mean over the steps."""
        step = batch.clock.step
        kept = min(self.config.momentum, step / (step + 1))
        self.teacher.follow(self.classifier, kept)
        self.mean.lerp_(self._seen, 1 - kept)
