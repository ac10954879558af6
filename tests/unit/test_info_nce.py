from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_pipeline.losses.info_nce import info_nce, two_view_info_nce


def brute_force(first: Tensor, second: Tensor, temperature: float) -> float:
    """One loop per row, as the formula is written."""
    rows = [row / row.norm() for row in torch.cat([first, second])]
    count = len(rows)
    losses = []
    for i, row in enumerate(rows):
        positive = (i + count // 2) % count
        candidates = [math.exp(float(row @ rows[j]) / temperature) for j in range(count) if j != i]
        losses.append(-math.log(math.exp(float(row @ rows[positive]) / temperature) / sum(candidates)))
    return sum(losses) / count


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(2, 5), st.floats(0.05, 5), st.integers(0, 1000))
def test_equals_the_loop(batch: int, width: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    assert float(two_view_info_nce(first, second, temperature)) == pytest.approx(
        brute_force(first, second, temperature), rel=1e-9
    )


def test_equals_lightlys() -> None:
    from lightly.loss import NTXentLoss

    first, second = torch.randn(16, 8), torch.randn(16, 8)
    assert float(two_view_info_nce(first, second, 0.3)) == pytest.approx(
        float(NTXentLoss(temperature=0.3)(first, second)), rel=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 100), st.integers(0, 100))
def test_scale_and_order_do_not_matter_and_the_loss_is_not_negative(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = float(two_view_info_nce(first, second, 0.2))
    order = torch.randperm(6, generator=generator)
    assert loss >= 0
    assert float(two_view_info_nce(scale * first, second, 0.2)) == pytest.approx(loss)
    assert float(two_view_info_nce(first[order], second[order], 0.2)) == pytest.approx(loss)
    assert float(two_view_info_nce(second, first, 0.2)) == pytest.approx(loss)


def test_gradient() -> None:
    first, second = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: two_view_info_nce(a, b, 0.5), (first, second))


def test_half_precision_and_zero_vectors_stay_finite() -> None:
    rows = torch.zeros(4, 8, dtype=torch.float16, requires_grad=True)
    loss = two_view_info_nce(rows, torch.randn(4, 8).half(), 0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_0_is_refused(temperature: float) -> None:
    rows = torch.randn(4, 2)
    with pytest.raises(ValueError, match="temperature"):
        info_nce(rows, rows, torch.arange(4), temperature)
