"""The momentum teacher: a copy of a network that follows it as a moving average."""

from __future__ import annotations

import copy
import math

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.models.batch_norm import norms_with_statistics
from ssl_pipeline.schedules import TrainProgress


class EMAMomentumConfig(FrozenModel):
    """The teacher's momentum: what is kept of it at each step; rises along half a cosine (Grill et al. 2020).

    Attributes:
        start: at the first step.
        end: at the last one.
    """

    start: float = Field(0.99, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)

    @field_validator("start")
    @classmethod
    def _moves(cls, value: float) -> float:
        if value == 1:
            raise ValueError("a momentum of 1.0 at the start never moves the teacher: take 0.99 or 0.996.")
        return value

    def at(self, clock: TrainProgress) -> float:
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * clock.step / clock.total)) / 2


class EMAModel(nn.Module):
    """A copy of a network without gradients, whose parameters follow the student's.

    Its norms are in training mode, with running statistics of their own. All else is in evaluation mode: dropout and stochastic depth
    are the student's, and would only blur the targets.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> EMAModel:
        """As torch's, for the norms alone, but those of which the network itself keeps the statistics."""
        super().train(mode)
        norms = set(norms_with_statistics(self.network))
        for module in self.network.modules():
            # The flag itself: what ``train(True)`` has cleared above must stay so.
            module.training = module.training and module in norms
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.network(images)
        return rows

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """``teacher ← momentum · teacher + (1 − momentum) · student``; called after the optimizer's step."""
        kept: list[Tensor] = list(self.network.parameters())
        new: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(kept, new, 1 - momentum)  # one kernel's start for all of them
        # Some of timm's layers keep what they made of their parameters until training mode is set.
        self.train(self.training)
