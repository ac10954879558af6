"""The contract of a method across domains: a task around a classifier, over labeled and unlabeled images at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.config.base import ComponentConfig
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import RegimeConfig, TrainContext, TrainingConfig
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.engine.task import Embeddings, StepOutput, Task
from ssl_pipeline.losses.memory_bank import MemoryBank
from ssl_pipeline.models.batch_norm import batch_norms
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.preprocessing import Preprocessing

Phase = Literal["source", "joint", "target"]
Control = Literal["no_shift", "noise", "shuffled"]


class MethodConfig(ComponentConfig, ABC):
    """The base of every method's ``Config``.

    Attributes:
        source: the domains with labels; null takes all that are no target.
        target: the domains to adapt to. Their labels, if any, are read by the final metrics alone.
        target_labels: labels of each class in the target that are learned from, with the source's (semi-supervised).
        negative_control: a negative control instead of the target's training images: ``no_shift`` takes a half of the source's (the other half
            is learned from, and the source is measured), ``noise`` and ``shuffled`` replace their pixels while the real target is
            measured. Null: none.
        known: the classes to learn; images of other classes are left out of the source, and unknown in the target. Null: all.
        task: the class of the method.
        phases: the trainings, one after the other: ``source`` sees labeled images alone, ``joint`` as many of the target
            beside them, ``target`` the target's alone.
        supports_frozen: whether the method works where only the head is trained.
        head: the one ``downstream.head`` that the method is made for; None takes any.
        selects: whether labeled images held out of the *source* choose the step that is kept, instead of the last one.
        keeps_statistics: whether it works with ``regime.freeze_bn_stats=true``, as it does not estimate the encoder's statistics anew.
    """

    task: ClassVar[Callable[..., Method]]
    phases: ClassVar[tuple[Phase, ...]] = ("joint",)
    supports_frozen: ClassVar[bool] = False
    head: ClassVar[str | None] = None
    selects: ClassVar[bool] = False
    keeps_statistics: ClassVar[bool] = True
    source: tuple[str, ...] | None = None
    target: tuple[str, ...] = Field((), validate_default=False)
    target_labels: int = Field(0, ge=0)
    negative_control: Control | None = None
    known: tuple[str, ...] | None = None

    @property
    def target_phase(self) -> TrainingConfig:
        """The training of the phase ``target``."""
        raise NotImplementedError(f"{self.name} has no training on the target alone")

    @property
    def starts_from(self) -> str | None:
        """The folder of a finished model that is adapted without an image of its source; None for a method that has a source."""
        return None

    def check(self, downstream: DownstreamConfig, regime: RegimeConfig) -> list[str]:
        """What can't be combined with the task or the regime, as sentences."""
        problems = []
        if downstream.name != "classification":
            problems.append(f"`domain` is for downstream=classification, and this is {downstream.name}.")
        if regime.name == "frozen" and not self.supports_frozen:
            problems.append(
                f"`domain={self.name}` moves the encoder, and regime `frozen` trains the head alone: take another regime."
            )
        if self.negative_control is not None and self.target_labels:
            problems.append(
                f"`domain.negative_control={self.negative_control}` hides the target, and `domain.target_labels` teaches {self.target_labels} of "
                "its labels a class: take one of them."
            )
        if self.head is not None and getattr(downstream, "head", None) != self.head:
            problems.append(f"`domain={self.name}` needs the {self.head} head: set downstream.head={self.head}.")
        if regime.freeze_bn_stats and not self.keeps_statistics:
            problems.append(
                f"`domain={self.name}` estimates BatchNorm's statistics anew, and `regime.freeze_bn_stats=true` keeps stage one's: set "
                "regime.freeze_bn_stats=false, or take another method."
            )
        return problems

    def build(self, classifier: Classification, target: IndexedDataset) -> Method:
        """The task around a classifier; ``target`` has no labels."""
        return self.task(self, classifier)


class Method(Task, ABC):
    """A classifier that is trained across domains by a method.

    In a joint batch the first half of the samples is labeled, and the second half is the target's, with label −1.
    """

    reads_labels = True

    def __init__(self, config: MethodConfig, classifier: Classification) -> None:
        super().__init__()
        self.config, self.classifier = config, classifier
        self.encoder = classifier.encoder

    def features_and_logits(self, images: Tensor) -> Embeddings:
        features = self.classifier.neck_features(images)
        return {"features": features, "logits": self.classifier.head(features)}

    def embed(self, batch: Batch) -> Embeddings:
        return self.features_and_logits(batch.views[0])

    def param_groups(self) -> list[dict[str, Any]]:
        """The classifier's groups, and one with the method's own parameters."""
        groups = self.classifier.param_groups()
        known = {id(parameter) for group in groups for _, parameter in group["params"]}
        own = [(n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) not in known]
        return [*groups, {"params": own, "lr_factor": 1.0}] if own else groups

    def finish(self, target: IndexedDataset, context: TrainContext) -> None:
        """What follows the last step: new BatchNorm statistics, averaged weights put into place."""


class SourceTask(Method):
    """Cross-entropy on labeled images: the beginning of every comparison."""

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        assert batch.label is not None
        right = (embeddings["logits"].argmax(1) == batch.label).float().mean()
        return StepOutput(self.classifier.supervised(embeddings["logits"], batch.label), {"accuracy": right})


class JointTask(Method):
    """Cross-entropy on the source, and a term on source and target together."""

    config: JointConfig

    def embed(self, batch: Batch) -> Embeddings:
        images = batch.views[0]
        if self.config.joint_forward:
            return self.features_and_logits(images)
        parts = [self.features_and_logits(part) for part in images.chunk(2)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        assert batch.label is not None
        source, target = ({n: rows.chunk(2)[half].float() for n, rows in embeddings.items()} for half in (0, 1))
        label = batch.label.chunk(2)[0]
        supervised = self.classifier.supervised(source["logits"], label)
        with torch.autocast(label.device.type, enabled=False):  # similarities and covariances lose most in bf16
            term = self.term(source, target, batch)
        right = (source["logits"].argmax(1) == label).float().mean()
        metrics: dict[str, Tensor | float] = {
            "supervised": supervised.detach(), "term": term.detach(), "accuracy": right,
        }  # fmt: skip
        return StepOutput(supervised + self.config.weight * term, metrics)

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        """The method's loss; that of its config by default."""
        return self.config.term(source, target)


class MemoryTask(JointTask):
    """A joint task with an exemplar memory of the target's features, one row an image (``samples`` of them)."""

    def __init__(self, config: JointConfig, classifier: Classification, samples: int) -> None:
        super().__init__(config, classifier)
        self.bank = MemoryBank(samples, classifier.width)
        self._rows: Tensor | None = None

    def prime(self, extract: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
        self.bank.fill(extract(self.classifier.neck_features))

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        self._rows = target["features"].detach()
        return self.memory_term(target, batch.index.chunk(2)[1], batch.clock)

    @abstractmethod
    def memory_term(self, target: Embeddings, index: Tensor, clock: TrainProgress) -> Tensor:
        """The term on the target's side; ``index`` are its rows of the memory, int64 of shape (B,)."""

    def momentum(self, clock: TrainProgress) -> float:
        """What is kept of a memory row when its image is seen again."""
        return 0.0

    def after_step(self, batch: Batch) -> None:
        assert self._rows is not None
        self.bank.update(batch.index.chunk(2)[1], self._rows, self.momentum(batch.clock))
        self._rows = None


class JointConfig(MethodConfig, ABC):
    """The base of the methods that see source and target in one step.

    Attributes:
        weight: of the method's term; the source's cross-entropy has weight 1.
        joint_forward: one forward for source and target, so that they share BatchNorm's batch statistics; false runs one for
            each. The running statistics are of both either way.
    """

    task: ClassVar[Callable[..., Method]] = JointTask
    weight: float = Field(1.0, ge=0)
    joint_forward: bool = True

    def term(self, source: Embeddings, target: Embeddings) -> Tensor:
        """The loss of a method that needs nothing else: of ``features`` (B, D) and ``logits`` (B, K) of both sides, float32; a scalar."""
        raise NotImplementedError(f"{self.name}: a method has a term, in its config or its task")


class GeneralizationConfig(MethodConfig, ABC):
    """The base of the methods that never see the target: labeled images held out of the *sources* choose the step that is kept."""

    task: ClassVar[Callable[..., Method]] = SourceTask
    phases: ClassVar[tuple[Phase, ...]] = ("source",)
    selects: ClassVar[bool] = True


@torch.no_grad()
def update_bn(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    source: IndexedDataset,
    preprocessing: Preprocessing,
    share: DistInfo,
) -> None:
    """Sets every BatchNorm's mean and variance to those of a source's images; nothing else of the network changes.

    Every process reads all images, so that all get the same statistics. An encoder that keeps its statistics keeps them here too.
    """
    keepers = [m for m in network.modules() if isinstance(m, Encoder) and m.keeps_statistics]
    kept = {id(layer) for encoder in keepers for layer in batch_norms(encoder)}
    layers = [layer for layer in batch_norms(network) if id(layer) not in kept]
    was_training, momenta = network.training, [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's cumulative mean over the batches
        layer.train()
    # Drawn, because images may come class by class: a part of one class varies less than all images do. Even parts weigh the same.
    order = permutation(len(source), "BatchNorm statistics")
    for part in order.tensor_split(max(1, len(source) // 256)):
        images = torch.cat(list(read_in_order(source, preprocessing, share.device, part, chunk=len(part))))
        forward(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(was_training)
