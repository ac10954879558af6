from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_pipeline.metrics.knn import _greatest, knn_predict, nearest_neighbors
from ssl_pipeline.metrics.linear_probe import Probes, sgd_probes
from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import warmup_cosine


def blobs(count: int = 90, classes: int = 3, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return 2 * torch.eye(classes, width)[labels] + 7 + torch.randn(count, width, generator=generator), labels


def trained_alone(features: Tensor, labels: Tensor, rate: float, epochs: int, batch: int) -> tuple[Tensor, Tensor]:
    """One rate, by torch's own optimizer and autograd."""
    mean, std = features.mean(0), features.std(0, correction=0)
    standard = (features - mean) / std
    linear = torch.nn.Linear(features.shape[1], 3)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
    steps = len(features) // batch
    for epoch in range(epochs):
        order = permutation(len(features), 3, "probe", epoch)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * warmup_cosine(epoch * steps + step, epochs * steps, 0, 0, 0)
            rows = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            F.cross_entropy(linear(standard[rows]), labels[rows]).backward()
            optimizer.step()
    weight = linear.weight.detach() / std
    return weight, linear.bias.detach() - weight @ mean


def test_all_rates_at_once_are_each_rate_alone() -> None:
    features, labels = blobs()
    rates = (0.01, 0.3, 1.0)
    probes = sgd_probes(features, labels, 3, rates, epochs=4, batch=25, seed=3)
    for i, rate in enumerate(rates):
        weight, bias = trained_alone(features, labels, rate, 4, 25)
        torch.testing.assert_close(probes.weight[i], weight, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(probes.bias[i], bias, atol=1e-3, rtol=1e-4)


def test_the_choice_is_by_validation_labels_and_the_lowest_rate_of_equals() -> None:
    identity = torch.eye(3)
    weight = torch.stack([identity, identity.roll(1, 0), identity])
    probes = Probes((0.3, 1.0, 0.1), weight, torch.zeros(3, 3))
    rows, labels = torch.eye(3), torch.arange(3)
    assert probes.choose(rows, labels) == (2, [1.0, 0.0, 1.0])
    assert probes.choose(rows, labels.roll(-1))[0] == 1
    learned = sgd_probes(*blobs(), 3, (0.1,), epochs=3)
    held_out, truth = blobs(seed=1)
    assert learned.choose(held_out, truth)[1][0] > 0.8


def test_neighbors_are_those_of_the_whole_matrix_whatever_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = blobs(40)
    queries, _ = blobs(11, seed=1)
    cosines = F.cosine_similarity(queries[:, None], bank[None], dim=2)
    value, index = cosines.topk(6, dim=1)
    monkeypatch.setattr("ssl_pipeline.metrics.knn._SIMILARITIES", 4 * len(bank))
    parts = list(nearest_neighbors(queries, bank, 6))
    assert [len(part) for part, _ in parts] == [4, 4, 3]
    assert torch.equal(torch.cat([found for _, found in parts]), index)
    torch.testing.assert_close(torch.cat([found for found, _ in parts]), value)


@given(st.integers(1, 9), st.integers(1, 150), st.sampled_from([2, 3, 8]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_the_greatest_are_topks_with_blocks_or_without(k: int, count: int, block: int, seed: int) -> None:
    similarity = torch.randperm(4 * count, generator=torch.Generator().manual_seed(seed)).float().reshape(4, count)
    k = min(k, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_pipeline.metrics.knn._BLOCK", block)
        value, index = _greatest(similarity, k)
    expected = similarity.topk(k, dim=1)
    assert torch.equal(value, expected.values)
    assert torch.equal(index, expected.indices)


def test_a_very_small_temperature_does_not_overflow() -> None:
    bank, labels = blobs()
    queries, _ = blobs(9, seed=1)
    nearest = labels[F.cosine_similarity(queries[:, None], bank[None], dim=2).argmax(1)]
    assert torch.equal(knn_predict(queries, bank, labels, 3, k=5, temperature=1e-4), nearest)
