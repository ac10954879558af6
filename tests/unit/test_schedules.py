from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.schema import resolve
from ssl_pipeline.losses.temperature import TemperatureConfig
from ssl_pipeline.schedules import TrainProgress, WarmupCosine, parse_duration, warmup_cosine


def test_warmup_starts_at_its_factor_and_meets_the_cosine_at_one() -> None:
    factors = [warmup_cosine(s, 100, 10, 0.1, 0.0) for s in range(101)]
    assert factors[0] == 0.1
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0, 1), st.floats(0, 1))
def test_factor_stays_between_its_ends_and_is_monotone_in_each_part(
    total: int, warmup: int, start: float, end: float
) -> None:
    warmup = min(warmup, total)
    factors = [warmup_cosine(s, total, warmup, start, end) for s in range(total)]
    assert all(min(start, end) - 1e-12 <= f <= 1 + 1e-12 for f in factors)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(factors[:warmup]))
    assert all(a >= b - 1e-12 for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def test_durations() -> None:
    assert parse_duration("10 epochs").steps(50, 1000) == 500
    assert parse_duration("7 steps").steps(50, 1000) == 7
    assert parse_duration("5%").steps(50, 1000) == 50
    assert str(parse_duration("5%")) == "5%"


@pytest.mark.parametrize("text", ["10", "ten epochs", "5 miles", "", "1.2.3 steps", "-3 steps"])
def test_wrong_durations_are_told(text: str) -> None:
    with pytest.raises(ConfigError, match="`warmup`"):
        resolve(WarmupCosine, {"warmup": text})


def test_temperature_moves_to_its_value() -> None:
    config = TemperatureConfig(value=0.2, start=1.0, warmup=parse_duration("10 steps"))
    assert config.at(TrainProgress(0, 100, 10)) == 1.0
    assert config.at(TrainProgress(5, 100, 10)) == pytest.approx(0.6)
    assert config.at(TrainProgress(10, 100, 10)) == 0.2
    assert config.at(TrainProgress(99, 100, 10)) == 0.2
