"""Means with their 95 % interval (Student's t): a figure without one means little."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval.

    Attributes:
        mean: over the values.
        half: half-width; infinite for a single value, which says nothing of the spread.
    """

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    def percent(self, signed: bool = False) -> str:
        """In percentage points, such as ``71.3 ± 1.2``."""
        mean = f"{100 * self.mean:+.1f}" if signed else f"{100 * self.mean:.1f}"
        return mean if self.half == float("inf") else f"{mean} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, float("inf"))
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, half)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean difference of values that share their seeds, with its 95 % interval."""
    return interval([value - base for value, base in zip(values, baseline, strict=True)])
