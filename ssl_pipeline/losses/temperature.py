"""The temperature τ that divides the logits of a softmax: above 1 it smooths, below 1 it sharpens."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.losses.info_nce import Match
from ssl_pipeline.schedules import Duration, TrainProgress, parse_duration


class CosineConfig(FrozenModel):
    """A temperature that swings (Kukleva et al. 2023): high ones learn groups, low ones separate instances.

    Attributes:
        max: the greatest temperature; ``value`` is the least.
        period: from one greatest value to the next.
        phase: where the first period starts, as a share of it; at 0 it starts high.
    """

    max: float = Field(1.0, gt=0)
    period: Duration = parse_duration("20%")
    phase: float = Field(0.0, ge=0, lt=1)


class LearnedConfig(FrozenModel):
    """A temperature that is learned, by its logarithm and without weight decay (as CLIP's, Radford et al. 2021).

    Attributes:
        min: lower bound, after every step.
        max: upper bound.
    """

    min: float = Field(0.01, gt=0)
    max: float = Field(1.0, gt=0)


class TemperatureConfig(FrozenModel):
    """A temperature: fixed, scheduled or learned.

    Attributes:
        value: the temperature after the warm-up; where learning starts; the least of ``cosine``.
        start: the temperature of the first step.
        warmup: how long it moves, linearly, from ``start`` to ``value``; ``0 steps`` keeps it fixed, ``100%`` moves it over the whole run.
        cosine: lets it swing after the warm-up.
        learned: lets the loss move it.
        other_domain: the temperature towards rows of other domains; ``value`` and the rest then hold within a domain.
    """

    short_for: ClassVar[str | None] = "value"
    value: float = Field(0.5, gt=0)
    start: float = Field(0.5, gt=0)
    warmup: Duration = parse_duration("0 steps")
    cosine: CosineConfig | None = None
    learned: LearnedConfig | None = None
    other_domain: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_way_only(self) -> TemperatureConfig:
        if self.learned is not None:
            if self.cosine is not None or self.warmup.value > 0:
                raise ValueError("a learned temperature has no schedule: set `warmup` to 0 steps and `cosine` to null.")
            if not self.learned.min <= self.value <= self.learned.max:
                raise ValueError(
                    f"it is to be learned between {self.learned.min} and {self.learned.max}, and starts at {self.value}."
                )
        if self.cosine is not None:
            if self.cosine.max < self.value:
                raise ValueError(f"`cosine.max` of {self.cosine.max} is below `value` of {self.value}, its least.")
            if self.cosine.period.value == 0:
                raise ValueError("`cosine.period` must be above 0.")
        return self

    def at(self, clock: TrainProgress) -> float:
        length = self.warmup.on(clock)
        if clock.step < length:
            return self.start + (self.value - self.start) * clock.step / length
        if self.cosine is None:
            return self.value
        turn = (clock.step - length) / max(1, self.cosine.period.on(clock)) + self.cosine.phase
        return self.value + (self.cosine.max - self.value) * (1 + math.cos(2 * math.pi * turn)) / 2


class Temperature(nn.Module):
    """A temperature as a part of a task."""

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        self.config = config
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.value))) if config.learned else None

    def forward(self, clock: TrainProgress) -> float | Tensor:
        return self.config.at(clock) if self.log_scale is None else (-self.log_scale).exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps a learned temperature within its bounds; called after the optimizer's step."""
        if self.log_scale is not None and self.config.learned is not None:
            self.log_scale.clamp_(-math.log(self.config.learned.max), -math.log(self.config.learned.min))


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """The softmax over the last dimension at a temperature; same shape."""
    return torch.softmax(logits / temperature, dim=-1)


def entropy_share(logits: Tensor, temperature: float) -> Tensor:
    """The softmax's entropy ÷ log N, between 0 (one candidate takes all) and 1 (all are alike); shape without N."""
    return _entropy(softmax(logits, temperature)) / math.log(logits.shape[-1])


@torch.no_grad()
def temperature_metrics(
    queries: Tensor,
    keys: Tensor,
    positive: Match,
    temperature: float | Tensor,
    own: Match | None = None,
    rows: int = 256,
) -> dict[str, Tensor]:
    """What a temperature does to a real batch: the distribution of the softmax over the candidates, and with it of the gradient.

    Args:
        queries: shape (N, D).
        keys: shape (M, D).
        positive: see :func:`ssl_pipeline.losses.info_nce.info_nce`.
        temperature: above 0, one for all.
        own: which key is the query itself, as in ``info_nce``.
        rows: how many queries are taken, evenly spaced: the metrics are means.

    Returns:
        ``entropy_share``: the softmax's entropy ÷ log of the candidates. ``effective_negatives``: the exponential of the
        entropy among the negatives, between 1 and their number. ``p_positive``. ``hardest_1pct`` and ``hardest_5pct``: the
        share of the negatives' gradient that falls on the hardest of them.
    """
    chosen = torch.linspace(0, len(queries) - 1, min(rows, len(queries)), device=queries.device).long()
    unit = [torch.nn.functional.normalize(part.float(), dim=1) for part in (queries[chosen], keys)]
    logits = unit[0] @ unit[1].T / temperature
    is_positive = positive[0][chosen, None] == positive[1][None]
    if own is not None:
        is_own = own[0][chosen, None] == own[1][None]
        is_positive &= ~is_own
        logits = logits.masked_fill(is_own, -torch.inf)
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    negatives = logits.masked_fill(is_positive, -torch.inf)
    candidates = torch.isfinite(logits).sum(1).float()
    count = torch.isfinite(negatives).sum(1)
    shares = negatives.softmax(1).sort(1, descending=True).values
    running = shares.cumsum(1)

    def hardest(share: float) -> Tensor:
        last = (count * share).ceil().long().clamp_min(1) - 1
        return running.gather(1, last[:, None]).mean()

    return {
        "entropy_share": (_entropy(p) / candidates.log()).mean(),
        "effective_negatives": _entropy(shares).exp().mean(),
        "p_positive": p.masked_fill(~is_positive, 0.0).sum(1).mean(),
        "hardest_1pct": hardest(0.01),
        "hardest_5pct": hardest(0.05),
    }


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum(-1)
    return entropy
