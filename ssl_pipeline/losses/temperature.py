"""The temperature τ that divides the logits of a softmax: above 1 it smooths, below 1 it sharpens."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import Strict
from ssl_pipeline.schedules import Clock, Duration, parse_duration


class TemperatureConfig(Strict):
    """A temperature, fixed or warmed.

    Attributes:
        value: the temperature after the warm-up.
        start: the temperature of the first step.
        warmup: how long it moves, linearly, from ``start`` to ``value``; ``0 steps`` keeps it fixed.
    """

    value: float = Field(0.5, gt=0)
    start: float = Field(0.5, gt=0)
    warmup: Duration = parse_duration("0 steps")

    def at(self, clock: Clock) -> float:
        """The temperature at a step."""
        length = self.warmup.on(clock)
        if clock.step >= length:
            return self.value
        return self.start + (self.value - self.start) * clock.step / length


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """The softmax over the last dimension at a temperature; same shape."""
    return torch.softmax(logits / temperature, dim=-1)


def entropy_share(logits: Tensor, temperature: float) -> Tensor:
    """The softmax's entropy ÷ log N, between 0 (one candidate takes all) and 1 (all are alike); shape without N."""
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    return entropy / torch.log(torch.tensor(float(logits.shape[-1])))
