"""Means with their 95 % interval (Student's t)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtr, stdtrit

LEVEL = 0.05  # a finding's p-value is below it
Verdict = Literal["gain", "loss", "no difference", "one seed"]


@dataclass(frozen=True)
class Interval:
    """A mean, the half-width of its 95 % interval, and the p-value of a mean of 0; for a single value infinite and NaN."""

    mean: float
    half: float
    p: float = math.nan

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def verdict(self, p: float | None = None) -> Verdict:
        """What to make of a difference at the 5 % level, by its own p-value or another one, such as one of :func:`holm`."""
        p = self.p if p is None else p
        if math.isnan(p):
            return "one seed"
        if p >= LEVEL:
            return "no difference"
        return "gain" if self.mean > 0 else "loss"

    def percent(self, signed: bool = False) -> str:
        """In percentage points, such as ``71.3 ± 1.2``."""
        return _shown(100 * self.mean, 100 * self.half, ".1f", signed)

    def plain(self, signed: bool = False) -> str:
        """As it is, such as ``0.713 ± 0.012``."""
        return _shown(self.mean, self.half, ".3f", signed)


def _shown(mean: float, half: float, form: str, signed: bool) -> str:
    shown = format(mean, f"{'+' if signed else ''}{form}")
    return shown if math.isinf(half) else f"{shown} ± {half:{form}}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, float("inf"))
    freedom, error = len(values) - 1, statistics.stdev(values) / len(values) ** 0.5
    half = float(stdtrit(freedom, 0.975)) * error
    if error == 0:
        return Interval(mean, half, 1.0 if mean == 0 else 0.0)
    return Interval(mean, half, 2 * float(stdtr(freedom, -abs(mean) / error)))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean difference of values that share their seeds, with its 95 % interval."""
    return interval([value - base for value, base in zip(values, baseline, strict=True)])


def holm(p_values: Sequence[float]) -> list[float]:
    r"""P-values corrected for their number by Holm's step-down (Holm 1979).

    With all corrected values below α called findings, the chance of one false finding or more is at most α:

    .. math:: \tilde p_{(i)} = \min\bigl(1, \max_{j \le i} (m - j + 1)\, p_{(j)}\bigr)

    over the m values in increasing order, which need not be independent. NaN (a single seed) is no comparison, and stays.
    """
    corrected, least = list(p_values), 0.0
    order = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = least
    return corrected


def verdicts(differences: Sequence[Interval]) -> list[Verdict]:
    """What to make of differences from one baseline, their p-values corrected for their number by :func:`holm`.

    Corrected, a difference may be none although its own 95 % interval does not contain 0.
    """
    corrected = holm([one.p for one in differences])
    return [one.verdict(p) for one, p in zip(differences, corrected, strict=True)]
