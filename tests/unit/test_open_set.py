"""Open-set figures against scikit-learn and against loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.metrics import open_set_metrics
from ssl_pipeline.downstream import classification
from ssl_pipeline.downstream.pooled_task import Rows
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.metrics.classification import auroc
from ssl_pipeline.metrics.open_set import aupr_unknown, fpr_at_95_known, hos, neighbor_score, oscr, scores, threshold
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing

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


def noise(count: int, seed: int, darkest: float) -> ArrayDataset:
    """Images of noise, each dimmed by a factor of its own."""
    generator = torch.Generator().manual_seed(seed)
    factor = darkest + (1 - darkest) * torch.rand(count, 1, 1, 1, generator=generator)
    pixels = (256 * factor * torch.rand(count, 1, 12, 12, generator=generator)).byte()
    return ArrayDataset("noise", pixels, torch.arange(count) % 3, ("a", "b", "c"))


def test_the_rejection_of_hos_is_chosen_by_held_out_source_images() -> None:
    torch.manual_seed(0)
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=1, size=12, mean=(0.5,), std=(0.3,)
    )
    model = classification.Config(name="classification", head="cosine").build(blueprint.build()[0], 3)
    preprocessing, share = Preprocessing(12, (0.5,), (0.3,)), DistInfo(0, 1, torch.device("cpu"))
    taught, held_back, source = noise(30, 0, 0.8), noise(41, 1, 0.5), noise(30, 2, 0.5)
    target, unknown = noise(60, 3, 0.0), noise(50, 4, 0.3)

    def read(images: ArrayDataset) -> Rows:
        return model.read(images, preprocessing, share)

    known = {"source": read(source), "target": read(target)}
    figures = open_set_metrics(
        model.eval(), read(taught), read(held_back), known, ("target",), read(unknown), share.device
    )

    def logits(images: ArrayDataset) -> Tensor:
        return extract(model, images, preprocessing, share, forward=model.predict)

    def expected(reference: Tensor) -> float:
        least = reference.sort().values[int(0.05 * len(reference))]  # 5 % of them are below it
        right = (logits(target).argmax(1) == target.labels) & (logits(target).amax(1) >= least)
        known = sum(float(right[target.labels == c].double().mean()) for c in range(3)) / 3
        rejected = float((logits(unknown).amax(1) < least).double().mean())
        return 2 * known * rejected / (known + rejected)

    by_source, by_target = expected(logits(held_back).amax(1)), expected(logits(target).amax(1))
    assert 0.1 < by_source != pytest.approx(by_target, abs=0.01)
    assert figures["open/max_logit/hos"] == pytest.approx(by_source, abs=1e-6)


def test_the_neighbors_score_is_minus_the_kth_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, bank = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    unit, units = torch.nn.functional.normalize(x), torch.nn.functional.normalize(bank)
    by_hand = torch.stack([-torch.stack([(row - other).norm() for other in units]).sort().values[2] for row in unit])
    assert torch.allclose(neighbor_score(x, bank, k=3), by_hand, atol=1e-5)


def test_every_score_is_higher_for_what_looks_known() -> None:
    logits = torch.tensor([[9.0, 0, 0], [1.0, 1.0, 1.0]])
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for score in scores(logits, features, torch.tensor([[1.0, 0.1]])).values():
        assert score[0] > score[1]
    energy = scores(logits, features, features)["energy"]
    assert torch.allclose(energy, logits.exp().sum(1).log())
