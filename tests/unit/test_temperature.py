from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.losses.temperature import Temperature, TemperatureConfig, entropy_share, temperature_metrics
from ssl_pipeline.schedules import TrainProgress
from tests.tasks import tiny_task


def at(config: TemperatureConfig, step: int, total: int = 100) -> float:
    return config.at(TrainProgress(step, total, 10))


def test_fixed_and_warmed() -> None:
    assert at(TemperatureConfig(value=0.2), 0) == at(TemperatureConfig(value=0.2), 99) == 0.2
    warmed = TemperatureConfig.model_validate({"value": 0.1, "start": 0.5, "warmup": "2 epochs"})
    assert [at(warmed, step) for step in (0, 10, 20, 99)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    linear = TemperatureConfig.model_validate({"value": 0.1, "start": 0.5, "warmup": "100%"})
    assert at(linear, 75) == pytest.approx(0.2)


def test_a_cosine_starts_high_and_returns_after_its_period() -> None:
    """Kukleva et al. 2023: between 0.1 and 1.0, starting high."""
    config = TemperatureConfig.model_validate({"value": 0.1, "cosine": {"max": 1.0, "period": "20 steps"}})
    assert [at(config, step) for step in (0, 5, 10, 15, 20)] == pytest.approx([1.0, 0.55, 0.1, 0.55, 1.0])
    falling = TemperatureConfig.model_validate(
        {"value": 0.1, "cosine": {"max": 1.0, "period": "20 steps", "phase": 0.25}}
    )
    assert [at(falling, step) for step in (0, 5)] == pytest.approx([0.55, 0.1])
    low_first = TemperatureConfig.model_validate(
        {"value": 0.1, "cosine": {"max": 1.0, "period": "20 steps", "phase": 0.5}}
    )
    assert [at(low_first, step) for step in (0, 10)] == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"learned": {}, "cosine": {}}, "no schedule"),
        ({"learned": {}, "warmup": "5 steps"}, "no schedule"),
        ({"value": 3.0, "learned": {"min": 0.01, "max": 1.0}}, "between 0.01 and 1.0"),
        ({"value": 0.5, "cosine": {"max": 0.2}}, "below"),
        ({"cosine": {"period": "0 steps"}}, "period"),
        ({"value": 0.0}, "greater than 0"),
        ({"value": -1.0}, "greater than 0"),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TemperatureConfig.model_validate(keys)


def test_a_learned_temperature_moves_within_its_bounds_and_does_not_decay() -> None:
    task, batch = tiny_task("simclr", ["pretext.temperature.learned.min=0.05", "pretext.temperature.value=0.06"])
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=50.0, weight_decay=0.1, scaling="none"), task, 8)
    scale = dict(task.named_parameters())["temperature.log_scale"]
    (group,) = (g for g in optimizer.param_groups if any(p is scale for p in g["params"]))
    assert group["weight_decay"] == 0
    before = float(scale.detach())
    task(batch).loss.backward()
    assert scale.grad is not None
    assert float(scale.grad) != 0
    scale.grad = torch.ones_like(scale) * -1  # lower it, far
    optimizer.step()
    assert float(scale.detach()) > before
    task.after_step(batch)
    assert float((-scale.detach()).exp()) == pytest.approx(0.05)


def test_the_gradient_of_a_learned_temperature_is_the_difference_quotient() -> None:
    task, batch = tiny_task("simclr", ["pretext.temperature.learned.min=0.05", "pretext.temperature.value=0.3"])
    task = task.double().eval()
    batch.views = [view.double() for view in batch.views]
    scale = dict(task.named_parameters())["temperature.log_scale"]
    task(batch).loss.backward()
    losses = []
    for shift in (1e-4, -1e-4):
        with torch.no_grad():
            scale.add_(shift)
            losses.append(float(task(batch).loss))
            scale.sub_(shift)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.1, 5), st.floats(1.01, 4))
def test_entropy_rises_with_the_temperature(logits: list[float], temperature: float, factor: float) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    low, high = (float(entropy_share(values, t)) for t in (temperature, temperature * factor))
    assert -1e-9 <= low <= high + 1e-9 <= 1 + 2e-9


def loop_figures(rows: torch.Tensor, temperature: float) -> dict[str, float]:
    """Of two views' rows, as the words say it."""
    unit, count = torch.nn.functional.normalize(rows, dim=1).tolist(), len(rows)
    found: dict[str, list[float]] = {
        key: [] for key in ("entropy_share", "effective_negatives", "p_positive", "hardest_1pct", "hardest_5pct")
    }

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p)

    for i in range(count):
        other = (i + count // 2) % count
        weight = {
            j: math.exp(sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) / temperature)
            for j in range(count)
            if j != i
        }
        p = {j: w / sum(weight.values()) for j, w in weight.items()}
        negatives = sorted((w for j, w in weight.items() if j != other), reverse=True)
        shares = [w / sum(negatives) for w in negatives]
        found["entropy_share"].append(entropy(list(p.values())) / math.log(count - 1))
        found["effective_negatives"].append(math.exp(entropy(shares)))
        found["p_positive"].append(p[other])
        for key, share in (("hardest_1pct", 0.01), ("hardest_5pct", 0.05)):
            found[key].append(sum(shares[: max(1, math.ceil(share * len(shares)))]))
    return {key: sum(values) / len(values) for key, values in found.items()}


def test_the_figures_are_what_their_names_say() -> None:
    rows, place = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60)
    pairs = place % 30
    figures = temperature_metrics(rows, rows, (pairs, pairs), 0.3, own=(place, place))
    assert {key: float(value) for key, value in figures.items()} == pytest.approx(loop_figures(rows, 0.3), rel=1e-4)


@pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: torch.ones_like(rows)], ids=["spread", "alike"])
def test_a_high_temperature_spreads_the_gradient(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    rows, place = make(torch.randn(40, 5)), torch.arange(40)
    pairs = place % 20
    cold, warm = (temperature_metrics(rows, rows, (pairs, pairs), t, own=(place, place)) for t in (0.05, 5.0))
    assert float(cold["hardest_5pct"]) >= float(warm["hardest_5pct"]) - 1e-6
    assert float(warm["effective_negatives"]) == pytest.approx(38, rel=0.02)


def test_a_temperature_per_domain_is_refused_where_there_are_no_domains() -> None:
    with pytest.raises(ConfigError, match="needs images with domains"):
        tiny_task("simclr", ["pretext.temperature.other_domain=0.2"])


def test_a_module_gives_floats_unless_it_learns() -> None:
    clock = TrainProgress(0, 10, 5)
    assert Temperature(TemperatureConfig(value=0.3))(clock) == 0.3
    learned = Temperature(TemperatureConfig.model_validate({"value": 0.3, "learned": {}}))(clock)
    assert isinstance(learned, torch.Tensor)
    assert learned.item() == pytest.approx(0.3)
