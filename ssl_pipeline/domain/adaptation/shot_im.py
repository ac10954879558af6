"""SHOT-IM: a model of the source goes to the target alone; the head stays, the features move."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.certainty import information_maximization
from ssl_pipeline.domain.method import Method, MethodConfig, Phase
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import TrainingConfig
from ssl_pipeline.engine.optim import OptimConfig
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.schedules import TrainProgress, parse_duration


class Config(MethodConfig):
    """Source hypothesis transfer by information maximization (Liang et al. 2020), source-free: the target's training sees no source.

    Attributes:
        adaptation: the training on the target.
        model: a finished model's folder, where the source's images are not at hand: it brings encoder, bottleneck and head, and goes
            to the target at once. Null: the source's training comes first.
    """

    phases: ClassVar[tuple[Phase, ...]] = ("source", "target")
    adaptation: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(
            length=parse_duration("15 epochs"), optim=OptimConfig(name="adamw", lr=0.0002, scaling="none")
        )
    )

    model: str | None = None

    @property
    def starts_from(self) -> str | None:
        """``model``."""
        return self.model

    def check(self, downstream: str, regime: str) -> list[str]:
        """A finished model comes without a source, and so without what is made of one."""
        problems = super().check(downstream, regime)
        given = [key for key in ("source", "control", "known", "target_labels") if getattr(self, key)]
        if self.model is not None and given:
            problems.append(
                f"`domain.model` starts from a finished model, without its source's images: {', '.join(f'`domain.{k}`' for k in given)} "
                "can't be had beside it."
            )
        return problems

    @property
    def on_target(self) -> TrainingConfig:
        """``adaptation``."""
        return self.adaptation

    def build(self, classifier: Classification, target: IndexedDataset) -> ShotIM:
        """The task around a classifier that was trained on the source."""
        del target
        return ShotIM(classifier)


class ShotIM(Method):
    """See :class:`Config`."""

    reads_labels = False

    def frozen(self, clock: TrainProgress) -> list[nn.Parameter]:
        """The head: it is what was learned from labels."""
        del clock
        return list(self.classifier.head.parameters())

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Information maximization on the target."""
        del batch
        return StepOutput(information_maximization(embeddings["logits"].float()))
