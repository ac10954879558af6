from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_pipeline.losses.memory_bank import MemoryBank, MemoryQueue


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_queue_holds_the_last_rows_that_came(size: int, batches: list[int]) -> None:
    queue, history = MemoryQueue(size, 2), list[int]()
    assert len(queue) == 0
    for count in batches:
        new = torch.arange(len(history), len(history) + count)
        queue.push(torch.stack([1.0 + new, torch.ones(count)], 1), new)
        history += new.tolist()
    rows, sample = queue.keys()
    assert sorted(sample.tolist()) == history[-size:]
    expected = F.normalize(torch.stack([1.0 + sample, torch.ones(len(sample))], 1), dim=1)
    torch.testing.assert_close(rows, expected)


def test_a_queue_survives_saving() -> None:
    queue, other = MemoryQueue(5, 3), MemoryQueue(5, 3)
    queue.push(torch.randn(4, 3), torch.arange(4))
    other.load_state_dict(queue.state_dict())
    rows = torch.randn(3, 3)
    for one in (queue, other):
        one.push(rows, torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(queue.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_bank_moves_its_rows_by_the_formula() -> None:
    bank, start, seen = MemoryBank(4, 3), torch.randn(4, 3), torch.randn(2, 3)
    bank.fill(start)
    start = F.normalize(start, dim=1)
    torch.testing.assert_close(bank.rows, start)
    bank.update(torch.tensor([3, 1]), seen, momentum=0.5)
    expected = start.clone()
    expected[[3, 1]] = F.normalize(0.5 * start[[3, 1]] + 0.5 * F.normalize(seen, dim=1), dim=1)
    torch.testing.assert_close(bank.rows, expected)


def test_of_a_sample_that_comes_twice_the_first_counts() -> None:
    bank = MemoryBank(3, 2)
    bank.fill(torch.ones(3, 2))
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    bank.update(torch.tensor([2, 0, 2]), rows, momentum=0.0)
    assert bank.rows[2].tolist() == pytest.approx([1.0, 0.0])
    assert bank.rows[0].tolist() == pytest.approx([0.0, 1.0])
