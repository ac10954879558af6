"""DINO: a student matches, from every crop, the class-like answer that a slowly moving teacher gives to the large ones.

    ℓ = −Σₖ Pₖ log pₖ,   P = softmax((g′(x′) − c) ÷ τ′),   p = softmax(g(x) ÷ τ)

averaged over the pairs of a global view x′, seen by the teacher g′, and another view x, seen by the student g; c is
the running mean of the teacher's answers.

When to use: vision transformers with multi-crop (``transform=dino``). Its prototypes and its teacher cost memory. Caron
et al. 2021, arXiv 2104.14294, equations 1 to 4.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from lightly.loss import DINOLoss
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Embeddings, PretextConfig, StepOutput, Task
from ssl_pipeline.losses.info_nce import to_float32
from ssl_pipeline.losses.temperature import TemperatureConfig
from ssl_pipeline.models.ema import EMAModel, EMAMomentumConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import PrototypeHead, distillation_head
from ssl_pipeline.pretext._base import forward_views
from ssl_pipeline.schedules import Duration, TrainProgress, parse_duration


class Config(PretextConfig):
    """DINO (Caron et al. 2021). Takes two global views and any number of local ones (multi-crop).

    Attributes:
        temperature: of the student.
        teacher_temperature: warmed from ``start`` to ``value``; lower than the student's, which sharpens the targets.
        hidden_width: of the head.
        bottleneck_width: where the head's rows are normalized.
        layers: of the head, before the prototypes.
        prototypes: the answers to choose from.
        momentum: of the teacher.
        center_momentum: of the mean that is subtracted from the teacher's answers against collapse.
        freeze_prototypes: how long the last layer stays as it started.
    """

    takes_local_views: ClassVar[bool] = True
    temperature: float = Field(0.1, gt=0)
    teacher_temperature: TemperatureConfig = TemperatureConfig(value=0.04, start=0.04, warmup=parse_duration("0 steps"))
    hidden_width: int = Field(2048, ge=1)
    bottleneck_width: int = Field(256, ge=2)
    layers: int = Field(3, ge=1)
    prototypes: int = Field(65536, ge=2)
    momentum: EMAMomentumConfig = EMAMomentumConfig(start=0.996)
    center_momentum: float = Field(0.9, ge=0, lt=1)
    freeze_prototypes: Duration = parse_duration("1 epoch")

    def build(self, encoder: Encoder, source: ImageDataset) -> DINO:
        if self.teacher_temperature.learned is not None or self.teacher_temperature.other_domain is not None:
            raise ConfigError(
                "`pretext.teacher_temperature` can be fixed or scheduled, no gradient reaches it: drop `learned`."
            )
        return DINO(self, encoder)


class _Student(nn.Module):
    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = distillation_head(encoder.width, config.hidden_width, config.bottleneck_width, config.layers)
        self.prototypes = PrototypeHead(config.bottleneck_width, config.prototypes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to cosines (B, prototypes)."""
        cosines: Tensor = self.prototypes(self.head(self.encoder.features(images)))
        return cosines


class _Loss(DINOLoss):  # type: ignore[misc]  # lightly has no types
    """lightly's loss, whose center waits for the optimizer's step: a step that is passed over must leave it as it was."""

    def update_center(self, teacher_out: Tensor) -> None:
        self._answers = teacher_out

    def move_center(self) -> None:
        super().update_center(self._answers)
        del self._answers


class DINO(Task):
    """See :class:`Config`. The center is lightly's, a persistent buffer, and taken over all processes."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.student = _Student(config, encoder)
        self.teacher = EMAModel(self.student)
        self.loss = _Loss(config.prototypes, student_temp=config.temperature, center_momentum=config.center_momentum)

    def embed(self, batch: Batch) -> Embeddings:
        answers = forward_views(self.student, batch.views)
        targets = forward_views(self.teacher, batch.views[:2])
        named = {f"student {i}": rows for i, rows in enumerate(answers)}
        return named | {f"teacher {i}": rows for i, rows in enumerate(targets)}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        temperature = self.config.teacher_temperature.at(batch.clock)
        targets = [to_float32(embeddings[f"teacher {i}"].detach()) for i in (0, 1)]
        answers = [to_float32(rows) for name, rows in embeddings.items() if name.startswith("student")]
        with torch.autocast(targets[0].device.type, enabled=False):
            loss: Tensor = self.loss(targets, answers, teacher_temp=temperature)
        spread = torch.stack(targets).flatten(0, 1).std(0).mean()
        return StepOutput(
            loss, {"teacher_temperature": temperature, "temperature": self.config.temperature, "target_std": spread}
        )

    def frozen(self, clock: TrainProgress) -> list[nn.Parameter]:
        return [self.student.prototypes.weight] if clock.step < self.config.freeze_prototypes.on(clock) else []

    def after_step(self, batch: Batch) -> None:
        self.loss.move_center()
        self.teacher.follow(self.student, self.config.momentum.at(batch.clock))
