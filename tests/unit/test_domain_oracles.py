"""Ours against other libraries, where they are installed: SKADA (needs skorch) and pytorch-ood, to 1e-5.

What differs by convention is stated where it is compared: SKADA's MMD has a kernel of distances that are not squared, so it is
given our kernel; pytorch-ood's FPR at 95 % has the unknown images as the ones to find, so it is given the sides exchanged.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_pipeline.domain.adaptation.dann import reverse_gradient
from ssl_pipeline.domain.losses import class_confusion, coral_loss, mmd_loss
from ssl_pipeline.metrics.classification import auroc
from ssl_pipeline.metrics.open_set import fpr_at_95_known, oscr, scores


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def skada() -> Any:
    pytest.importorskip("skorch")
    return pytest.importorskip("skada.deep.losses")


@pytest.fixture(scope="module")
def ood() -> Any:
    return pytest.importorskip("pytorch_ood.metrics.functional")


@pytest.mark.parametrize(("n", "m", "width"), [(20, 20, 8), (7, 31, 3), (64, 40, 32)])
def test_coral_is_skadas(skada: Any, n: int, m: int, width: int) -> None:
    first, second = rows(n, width, n).requires_grad_(), 2 * rows(m, width, m) + 1
    ours, theirs = coral_loss(first, second), skada.deepcoral_loss(first, second)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradient, other = (torch.autograd.grad(loss, first)[0] for loss in (ours, theirs))
    assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (9, 30)])
def test_mmd_is_skadas_estimate_with_our_kernel(skada: Any, n: int, m: int) -> None:
    first, second, bandwidths = rows(n, 6, n), rows(m, 6, m) + 1, (0.5, 1.0, 2.0)
    scale = torch.pdist(torch.cat([first, second])).square().mean()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([torch.exp(-torch.cdist(a, b).square() / (s * scale)) for s in bandwidths]).mean(0)

    theirs = skada._maximum_mean_discrepancy(first, second, kernel)
    assert float(mmd_loss(first, second, bandwidths)) == pytest.approx(float(theirs), abs=1e-5)


def test_the_reversed_gradient_is_skadas(skada: Any) -> None:
    del skada
    reverse = pytest.importorskip("skada.deep.modules").GradientReversalLayer.apply
    x, weight = rows(6, 4, 0).requires_grad_(), rows(6, 4, 1)
    ours, theirs = (torch.autograd.grad((f(x, 0.3) * weight).cos().sum(), x)[0] for f in (reverse_gradient, reverse))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert ours.abs().max() > 0.1


def test_class_confusion_is_skadas(skada: Any) -> None:
    logits = 3 * rows(24, 5, 0)
    assert float(class_confusion(logits, 2.5)) == pytest.approx(float(skada.mcc_loss(logits, T=2.5)), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [5, 10_000])  # with 5, most are equal
def test_open_set_figures_are_pytorch_oods(ood: Any, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = (torch.randint(0, levels, (120,), generator=generator) / levels + 0.3).double()
    unknown = (torch.randint(0, levels, (80,), generator=generator) / levels).double()
    label = torch.randint(0, 4, (120,), generator=generator)
    told = torch.where(torch.rand(120, generator=generator) < 0.7, label, (label + 1) % 4)
    outlier = -torch.cat([known, unknown])
    labels = torch.cat([label, torch.full((80,), -1)])
    predictions = torch.cat([told, torch.zeros(80, dtype=torch.int64)])
    assert auroc(known, unknown) == pytest.approx(float(ood.auroc(outlier, labels)), abs=1e-5)
    found = ood.oscr_score(outlier, predictions, labels)
    assert oscr(known, told == label, unknown) == pytest.approx(float(found), abs=1e-5)
    known_to_be_found = torch.cat([torch.full((120,), -1), torch.zeros(80, dtype=torch.int64)])
    fpr = ood.fpr_at_tpr(-outlier, known_to_be_found, 0.95)
    assert fpr_at_95_known(known, unknown) == pytest.approx(float(fpr), abs=1e-5)


def test_scores_are_pytorch_oods_with_the_sign_changed() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    logits, features = 4 * rows(30, 6, 0), rows(30, 3, 1)
    ours = scores(logits, features, features)
    theirs = {"msp": "MaxSoftmax", "max_logit": "MaxLogit", "energy": "EnergyBased"}
    for name, detector in theirs.items():
        assert torch.allclose(ours[name], -getattr(detectors, detector).score(logits), atol=1e-5), name
