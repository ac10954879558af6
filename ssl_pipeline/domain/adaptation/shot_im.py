"""SHOT-IM: a model of the source goes to the target alone; the head stays, the features move."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.domain.losses import information_maximization
from ssl_pipeline.domain.method import Method, MethodConfig, Phase
from ssl_pipeline.downstream.regime import RegimeConfig, TrainingConfig
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.engine.optim import OptimConfig
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.schedules import TrainProgress, parse_duration


class ShotIM(Method):
    """See :class:`Config`."""

    reads_labels = False

    def frozen(self, clock: TrainProgress) -> list[nn.Parameter]:
        return list(self.classifier.head.parameters())

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        return StepOutput(information_maximization(embeddings["logits"].float()))


class Config(MethodConfig):
    """Source hypothesis transfer by information maximization (Liang et al. 2020), source-free: the target's training sees no source.

    Attributes:
        adaptation: the training on the target.
        model: a finished model's folder, where the source's images are not at hand: it brings encoder, bottleneck and head, and goes
            to the target at once. Null: the source's training comes first.
    """

    task = ShotIM
    phases: ClassVar[tuple[Phase, ...]] = ("source", "target")
    adaptation: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(
            length=parse_duration("15 epochs"), optim=OptimConfig(name="adamw", lr=0.0002, scaling="none")
        )
    )

    model: str | None = None

    @property
    def starts_from(self) -> str | None:
        return self.model

    def check(self, downstream: DownstreamConfig, regime: RegimeConfig) -> list[str]:
        problems = super().check(downstream, regime)
        given = [key for key in ("source", "negative_control", "known", "target_labels") if getattr(self, key)]
        if self.model is not None and given:
            keys = ", ".join(f"`domain.{key}`" for key in given)
            problems.append(
                f"`domain.model` starts from a finished model, without its source's images: {keys} can't be had beside it."
            )
        return problems

    @property
    def target_phase(self) -> TrainingConfig:
        return self.adaptation
