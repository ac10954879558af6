"""The contract of a method across domains: a task around a classifier, over labeled and unlabeled images at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.controls import Control
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import TrainingConfig
from ssl_pipeline.engine.task import Embeddings, StepOutput, Task
from ssl_pipeline.transforms.preprocessing import Preprocessing

Phase = Literal["source", "joint", "target"]


class MethodConfig(ComponentConfig, ABC):
    """The base of every method's ``Config``.

    Attributes:
        source: the domains with labels; null takes all that are no target.
        target: the domains that it is for. Their labels, where there are some, are for the final figures alone.
        target_labels: labels of each class in the target that may be learned from after all (semi-supervised): they join the
            source's.
        control: what the target's training images are instead, to see whether a method gains where it can't: ``no_shift`` takes a
            half of the source's (the other half teaches, and the source is measured), ``noise`` and ``shuffled`` pixels take
            their places while the real target is measured. Null: what they are.
        known: the classes to learn; images of other classes are left out of the source, and unknown in the target. Null: all.
        phases: the trainings, one after the other: ``source`` sees labeled images alone, ``joint`` as many of the target
            beside them, ``target`` the target's alone.
        fits_bare_encoder: whether the method makes sense where nothing but the head is trained.
        head: the one ``downstream.head`` that the method is made for; None takes any.
        selects: whether labeled images held out of the *source* choose the step that is kept; otherwise it is the last one.
        keeps_statistics: whether it works with ``regime.statistics=kept``: it does not estimate the encoder's anew.
    """

    phases: ClassVar[tuple[Phase, ...]] = ("joint",)
    fits_bare_encoder: ClassVar[bool] = False
    head: ClassVar[str | None] = None
    selects: ClassVar[bool] = False
    keeps_statistics: ClassVar[bool] = True
    source: tuple[str, ...] | None = None
    target: tuple[str, ...] = Field((), validate_default=False)
    target_labels: int = Field(0, ge=0)
    control: Control | None = None
    known: tuple[str, ...] | None = None

    @property
    def on_target(self) -> TrainingConfig:
        """The training of the phase ``target``."""
        raise NotImplementedError(f"{self.name} has no training on the target alone")

    @property
    def starts_from(self) -> str | None:
        """The folder of a finished model that is adapted without an image of its source; None for a method that has a source."""
        return None

    def check_head(self, head: object) -> list[str]:
        """Whether ``downstream.head`` is the one that the method needs, as sentences if it is not."""
        if self.head is None or head == self.head:
            return []
        return [f"`domain={self.name}` needs the {self.head} head: set downstream.head={self.head}."]

    def check_statistics(self, kept: bool) -> list[str]:
        """Whether the regime's BatchNorm statistics go together with the method, as sentences."""
        if not kept or self.keeps_statistics:
            return []
        return [
            f"`domain={self.name}` estimates BatchNorm's statistics anew, and `regime.statistics=kept` keeps stage one's: set "
            "regime.statistics=batch, or take another method."
        ]

    def check(self, downstream: str, regime: str) -> list[str]:
        """What does not go together with the task or the regime, as sentences."""
        problems = []
        if downstream != "classification":
            problems.append(f"`domain` is for downstream=classification, and this is {downstream}.")
        if regime == "frozen" and not self.fits_bare_encoder:
            problems.append(
                f"`domain={self.name}` moves the encoder, and regime `frozen` trains the head alone: take another regime."
            )
        if self.control is not None and self.target_labels:
            problems.append(
                f"`domain.control={self.control}` hides the target, and `domain.target_labels` teaches {self.target_labels} of "
                "its labels a class: take one of them."
            )
        return problems

    @abstractmethod
    def build(self, classifier: Classification, target: IndexedDataset) -> Method:
        """The task around a classifier; of ``target`` it may read all but labels, which were taken away."""


class JointConfig(MethodConfig, ABC):
    """The base of the methods that see source and target in one step.

    Attributes:
        weight: of the method's term beside the source's cross-entropy.
        forwards: ``one`` forward over source and target, whose BatchNorm statistics are then of both; or ``two``, each with its
            own. Running statistics are of both either way.
    """

    weight: float = Field(1.0, ge=0)
    forwards: Literal["one", "two"] = "one"


class GeneralizationConfig(MethodConfig, ABC):
    """The base of the methods that never see the target: labeled images held out of the *sources* choose the step that is kept."""

    phases: ClassVar[tuple[Phase, ...]] = ("source",)
    selects: ClassVar[bool] = True


class Method(Task, ABC):
    """A classifier that is trained across domains; see :class:`MethodConfig`.

    In a joint batch the first half of the samples is labeled, and the second half is the target's, with label −1.
    """

    reads_labels = True

    def __init__(self, classifier: Classification) -> None:
        super().__init__()
        self.classifier = classifier
        self.encoder = classifier.encoder

    def features_and_logits(self, images: Tensor) -> Embeddings:
        """What the head reads and what it makes of it."""
        features = self.classifier.neck_features(images)
        return {"features": features, "logits": self.classifier.head(features)}

    def embed(self, batch: Batch) -> Embeddings:
        """Of the first view."""
        return self.features_and_logits(batch.views[0])

    def param_groups(self) -> list[dict[str, Any]]:
        """The classifier's, and what the method has of its own with all of the rate."""
        groups = self.classifier.param_groups()
        known = {id(parameter) for group in groups for _, parameter in group["params"]}
        own = [(n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) not in known]
        return [*groups, {"params": own, "lr_factor": 1.0}] if own else groups

    def finish(
        self, labeled: IndexedDataset, target: IndexedDataset, preprocessing: Preprocessing, share: DistInfo
    ) -> None:
        """What follows the last step: statistics estimated anew, averaged weights put into place."""
        del labeled, target, preprocessing, share


class SourceTask(Method):
    """Cross-entropy on labeled images: the beginning of every comparison."""

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Cross-entropy; accuracy beside it."""
        assert batch.label is not None
        right = (embeddings["logits"].argmax(1) == batch.label).float().mean()
        return StepOutput(self.classifier.supervised(embeddings["logits"], batch.label), {"accuracy": right})


class JointTask(Method):
    """Cross-entropy on the source, and a term on source and target together."""

    def __init__(self, config: JointConfig, classifier: Classification) -> None:
        super().__init__(classifier)
        self.weight, self.forwards = config.weight, config.forwards

    def embed(self, batch: Batch) -> Embeddings:
        """Source's and target's rows, one after the other."""
        images = batch.views[0]
        if self.forwards == "one":
            return self.features_and_logits(images)
        parts = [self.features_and_logits(part) for part in images.chunk(2)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Cross-entropy plus ``weight`` times the method's term, which is computed in fp32 under autocast, too."""
        assert batch.label is not None
        source, target = ({n: rows.chunk(2)[half].float() for n, rows in embeddings.items()} for half in (0, 1))
        label = batch.label.chunk(2)[0]
        supervised = self.classifier.supervised(source["logits"], label)
        with torch.autocast(label.device.type, enabled=False):  # similarities and covariances lose most in bf16
            term = self.term(source, target, batch)
        right = (source["logits"].argmax(1) == label).float().mean()
        metrics: dict[str, Tensor | float] = {
            "supervised": supervised.detach(),
            "term": term.detach(),
            "accuracy": right,
        }
        return StepOutput(supervised + self.weight * term, metrics)

    @abstractmethod
    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        """The method's loss on ``features`` (B, D) and ``logits`` (B, K) of both sides, float32; a scalar."""
