"""The golden values of docs/glossary: what a temperature does to softmax([1, 2, 3])."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_pipeline.losses.info_nce import info_nce
from ssl_pipeline.losses.temperature import entropy_share, softmax

LOGITS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [0.0900, 0.2447, 0.6652]), (2.0, [0.1863, 0.3072, 0.5065]), (0.5, [0.0159, 0.1173, 0.8668])],
)
def test_softmax_at_a_temperature(temperature: float, expected: list[float]) -> None:
    assert softmax(LOGITS, temperature).tolist() == pytest.approx(expected, abs=5e-5)


def test_entropy_rises_with_temperature() -> None:
    shares = [float(entropy_share(LOGITS, t)) for t in (0.1, 0.5, 1.0, 2.0, 10.0, 1000.0)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0, abs=1e-5)


def test_cross_entropy_of_the_top_logit_rises_towards_log_n() -> None:
    target = torch.tensor([2])
    losses = [float(F.cross_entropy(LOGITS[None] / t, target)) for t in (0.5, 1.0, 2.0, 10.0, 1e6)]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(math.log(3), abs=1e-5)


def test_identical_embeddings_give_the_log_of_the_candidates() -> None:
    rows = torch.ones(8, 4)
    place = torch.arange(8)
    loss = info_nce(rows, rows, (place, place.roll(-1)), 0.1, own=(place, place))
    assert float(loss) == pytest.approx(math.log(7), abs=1e-6)


def test_instance_discrimination_is_the_glossary_s_formula() -> None:
    """p(i | x) = exp(K[i]·f / β) ÷ Σ_j exp(K[j]·f / β), and InfoNCE is -log p with the memory as keys."""
    generator = torch.Generator().manual_seed(0)
    memory = F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1)
    features = F.normalize(torch.randn(3, 4, generator=generator, dtype=torch.float64), dim=1)
    index, beta = torch.tensor([4, 0, 2]), 0.07
    p = torch.exp(features @ memory.T / beta)
    p /= p.sum(1, keepdim=True)
    assert torch.allclose(p.sum(1), torch.ones(3, dtype=torch.float64))
    loss = info_nce(features, memory, (index, torch.arange(6)), beta)
    assert float(loss) == pytest.approx(float(-p[range(3), index].log().mean()), rel=1e-12)
