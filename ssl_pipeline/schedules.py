"""Pure functions of the step: a schedule has no state, so a resume has nothing to restore.

Time is counted in optimizer steps. A :class:`Duration` lets a config say it in epochs, steps or a share of the run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_serializer

from ssl_pipeline.config.base import FrozenModel

_UNITS: dict[str, Literal["epochs", "steps", "%"]] = {
    "epoch": "epochs", "epochs": "epochs", "ep": "epochs", "step": "steps", "steps": "steps", "%": "%",
}  # fmt: skip


@dataclass(frozen=True)
class TrainProgress:
    """Where a run is.

    Attributes:
        step: the optimizer step, from 0, as a run counts that had this batch size from its start: schedules go by it.
        total: the run's length in such steps.
        steps_per_epoch: an epoch's length in such steps.
        offset: how many more steps were really taken; not 0 where a run goes on with another batch size.
    """

    step: int
    total: int
    steps_per_epoch: int
    offset: int = 0

    @property
    def taken(self) -> int:
        """The optimizer steps that were really taken before this one: logs and checkpoints count them."""
        return self.step + self.offset

    @property
    def epoch(self) -> int:
        """The epoch, from 0."""
        return self.step // self.steps_per_epoch


class DurationValue(FrozenModel):
    """A length of training time: a number and its unit."""

    one_value: ClassVar[bool] = True
    value: float = Field(ge=0)
    unit: Literal["epochs", "steps", "%"]

    def steps(self, steps_per_epoch: int, total: int) -> int:
        """In optimizer steps, rounded to the nearest; ``total`` is what a share is a share of."""
        return round(self.value * {"epochs": steps_per_epoch, "steps": 1, "%": total / 100}[self.unit])

    def on(self, clock: TrainProgress) -> int:
        """In optimizer steps of a run."""
        return self.steps(clock.steps_per_epoch, clock.total)

    @model_serializer
    def _as_written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.unit == "%" else f"{self.value:g} {self.unit}"


def parse_duration(text: Any) -> Any:
    """Reads ``10 epochs``, ``500 steps`` or ``5%``; anything else is refused in words."""
    if isinstance(text, DurationValue):
        return text
    if text in (0, "0") and not isinstance(text, bool):  # nothing is nothing in any unit
        return DurationValue(value=0.0, unit="steps")
    if isinstance(text, int | float) and not isinstance(text, bool):
        raise ValueError(f"a unit is missing: write '{text:g} epochs', '{text:g} steps' or '{text:g}%'.")
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z%]+)\s*", str(text))
    if not match or match[2] not in _UNITS:
        raise ValueError(f"write a number and a unit, such as '10 epochs', '500 steps' or '5%'; got {text!r}.")
    try:
        value = float(match[1])
    except ValueError:
        raise ValueError(f"{match[1]!r} is not a number.") from None
    return DurationValue(value=value, unit=_UNITS[match[2]])


Duration = Annotated[DurationValue, BeforeValidator(parse_duration)]


def warmup_cosine(step: int, total: int, warmup: int, start_factor: float, end_factor: float) -> float:
    """The factor on a base value: a linear climb from ``start_factor`` to 1, then half a cosine to ``end_factor``.

    The first step (0) has ``start_factor``, step ``warmup`` has 1, and step ``total`` would have ``end_factor``
    (Goyal et al. 2017; Loshchilov and Hutter 2017).
    """
    if step < warmup:
        return start_factor + (1.0 - start_factor) * step / warmup
    if total <= warmup:
        return 1.0
    progress = min(1.0, (step - warmup) / (total - warmup))
    return end_factor + (1.0 - end_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupCosine(FrozenModel):
    """Warm-up, then cosine decay.

    Attributes:
        warmup: how long the rate climbs: with random weights a large rate is numerically unstable.
        warmup_start_factor: what the first step's rate is of the base rate.
        min_lr_factor: what the last rate is of the base rate.
    """

    warmup: Duration = parse_duration("0 steps")
    warmup_start_factor: float = Field(0.0, ge=0, le=1)
    min_lr_factor: float = Field(0.0, ge=0, le=1)

    def factor(self, clock: TrainProgress) -> float:
        return warmup_cosine(
            clock.step, clock.total, self.warmup.on(clock), self.warmup_start_factor, self.min_lr_factor
        )

    def set_lr(self, param_groups: list[dict[str, Any]], clock: TrainProgress) -> float:
        """Gives every group its rate of the step; computed from the step, so that processes can't multiply it.

        Returns:
            The first group's rate, for the log.
        """
        factor = self.factor(clock)
        for group in param_groups:
            group["lr"] = group["base_lr"] * factor
        return float(param_groups[0]["lr"])
