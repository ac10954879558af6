"""Open-set figures against scikit-learn and against loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from ssl_pipeline.domain.open_set import (
    aupr_unknown,
    auroc,
    fpr_at_95_known,
    hos,
    neighbour_score,
    oscr,
    scores,
    threshold,
)

# Few different values, so that many are equal.
VALUES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=30).map(torch.tensor)


@given(VALUES, VALUES)
@settings(max_examples=60, deadline=None)
def test_auroc_aupr_and_fpr_are_scikit_learns(known: Tensor, unknown: Tensor) -> None:
    both, is_known = torch.cat([known, unknown]).numpy(), [1] * len(known) + [0] * len(unknown)
    assert auroc(known, unknown) == pytest.approx(roc_auc_score(is_known, both), abs=1e-9)
    found = average_precision_score([1 - k for k in is_known], -both)
    assert aupr_unknown(known, unknown) == pytest.approx(found, abs=1e-9)
    fpr, tpr, _ = roc_curve(is_known, both, drop_intermediate=False)
    assert fpr_at_95_known(known, unknown) == pytest.approx(fpr[(tpr >= 0.95).argmax()], abs=1e-9)


@given(VALUES, VALUES, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_oscr_is_the_area_by_trapezoids_and_at_most_the_accuracy(known: Tensor, unknown: Tensor, seed: int) -> None:
    right = torch.rand(len(known), generator=torch.Generator().manual_seed(seed)) < 0.6
    levels = [float("inf"), *torch.cat([known, unknown]).unique().flip(0).tolist()]
    points = [
        (float((unknown >= level).double().mean()), float((right & (known >= level)).double().mean()))
        for level in levels
    ]
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points))
    assert oscr(known, right, unknown) == pytest.approx(area, abs=1e-9)
    assert oscr(known, right, unknown) <= float(right.double().mean()) + 1e-9


def test_hos_is_the_harmonic_mean_of_class_mean_and_rejection() -> None:
    right = torch.tensor([True, True, True, False, True, False])
    label = torch.tensor([0, 0, 0, 0, 1, 1])
    rejected = torch.tensor([True, False, False, False])
    assert hos(right, label, rejected) == pytest.approx(2 * 0.625 * 0.25 / 0.875)
    assert hos(right & False, label, rejected & False) == 0


def test_the_threshold_accepts_at_least_95_percent_and_no_more_than_it_must() -> None:
    known = torch.arange(100.0)
    assert threshold(known) == 5
    assert threshold(torch.tensor([3.0])) == 3


def test_the_neighbours_score_is_minus_the_kth_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, bank = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    unit, units = torch.nn.functional.normalize(x), torch.nn.functional.normalize(bank)
    by_hand = torch.stack([-torch.stack([(row - other).norm() for other in units]).sort().values[2] for row in unit])
    assert torch.allclose(neighbour_score(x, bank, k=3), by_hand, atol=1e-5)


def test_every_score_is_higher_for_what_looks_known() -> None:
    logits = torch.tensor([[9.0, 0, 0], [1.0, 1.0, 1.0]])
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for score in scores(logits, features, torch.tensor([[1.0, 0.1]])).values():
        assert score[0] > score[1]
    energy = scores(logits, features, features)["energy"]
    assert torch.allclose(energy, logits.exp().sum(1).log())
