"""Generalization methods: what each does to features or weights, against a loop. Their contract: test_adaptation.py."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_pipeline.domain.generalization.coral_over_sources import pairwise_coral
from ssl_pipeline.domain.generalization.mixstyle import mix_statistics
from tests.unit.test_adaptation import context, tiny_batches, tiny_method


def test_pairs_of_sources_count_alike_and_a_lonely_row_not_at_all() -> None:
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    domain = torch.tensor([4, 1, 4, 1, 7, 4, 1, 2, 2])
    parts: list[Tensor] = [rows[domain == d] for d in (1, 2, 4)]

    def of_pair(a: Tensor, b: Tensor) -> float:
        means = [float((a[:, i].mean() - b[:, i].mean()) ** 2) for i in range(3)]
        entries = np.cov(a.T.numpy()) - np.cov(b.T.numpy())
        return sum(means) / 3 + float((entries**2).sum()) / 9

    by_hand = sum(of_pair(a, b) for a, b in combinations(parts, 2)) / 3
    assert float(pairwise_coral(rows, domain)) == pytest.approx(by_hand, rel=1e-5)
    shifted = torch.cat([rows, rows + 2])  # another mean alone
    sides = torch.arange(18) // 9
    assert float(pairwise_coral(shifted, sides)) == pytest.approx(4, rel=1e-5)
    assert float(pairwise_coral(rows, torch.zeros(9, dtype=torch.int64))) == 0


def test_statistics_are_mixed_channel_by_channel() -> None:
    maps = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    other, share = torch.tensor([1, 2, 0]), torch.tensor([1.0, 0.0, 0.25])
    mixed = mix_statistics(maps, other, share)
    assert torch.allclose(mixed[0], maps[0], atol=1e-4)
    for channel in range(2):
        assert torch.allclose(mixed[1, channel].mean(), maps[2, channel].mean(), atol=1e-4)
        expected = 0.25 * maps[2, channel].std() + 0.75 * maps[0, channel].std()
        assert torch.allclose(mixed[2, channel].std(), expected, atol=1e-4)


def test_mixstyle_mixes_in_training_alone_and_leaves_no_trace() -> None:
    task, config, target = tiny_method("mixstyle", "domain.probability=1.0")
    classifier, batch = task.classifier, next(tiny_batches(config, target).from_step(0))
    classifier.eval()
    quiet = classifier.predict(batch.views[0])
    torch.manual_seed(0)
    assert torch.equal(classifier.predict(batch.views[0]), quiet)
    classifier.train()
    first, second = classifier.predict(batch.views[0]), classifier.predict(batch.views[0])
    assert not torch.equal(first, second)
    task.finish(target, context())
    assert torch.equal(classifier.predict(batch.views[0]), classifier.predict(batch.views[0]))


@pytest.mark.parametrize(("start", "expected"), [("0 steps", 3.5), ("2 steps", 4.5), ("25%", 4.5), ("100 steps", 5.5)])
def test_averaged_weights_are_the_plain_mean_from_the_start_on(start: str, expected: float) -> None:
    task, config, target = tiny_method("weight_averaging", f"domain.start={start}")
    parameter = next(task.classifier.parameters())
    for step, batch in enumerate(tiny_batches(config, target, 8).from_step(0)):  # weights 0 to 7
        with torch.no_grad():
            parameter.fill_(float(step))
        task.after_step(batch)
    task.finish(target, context())
    assert torch.allclose(parameter, torch.full_like(parameter, expected))
