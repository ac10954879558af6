from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.engine.checkpoint import check_steps_left


class Images:
    """As many as are said; nobody looks at them."""

    labels = pixels = bad_files = domains = None

    def __init__(self, count: int) -> None:
        self._count = self.length = count

    def __len__(self) -> int:
        return self._count


def batches(count: int, size: int, total: int, seed: int = 3, rank: int = 0, processes: int = 1) -> IndexedLoader:
    source: Any = Images(count)
    share = DistInfo(rank, processes, torch.device("cpu"))
    return IndexedLoader(source, None, size, seed, share, total, 0)  # type: ignore[arg-type]


@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(0, 5))
def test_an_epoch_holds_each_sample_at_most_once_and_shares_make_the_whole(
    extra: int, steps: int, processes: int, seed: int
) -> None:
    batch = 4 * processes
    samples = steps * batch + extra % batch
    epoch = []
    for step in range(steps):
        shares = [batches(samples, batch, 3 * steps, seed, rank, processes).samples(step) for rank in range(processes)]
        assert torch.equal(torch.cat(shares), batches(samples, batch, 3 * steps, seed).samples(step))
        epoch += torch.cat(shares).tolist()
    assert len(set(epoch)) == len(epoch) == steps * batch


def test_epochs_and_seeds_differ() -> None:
    def first(step: int, seed: int) -> list[int]:
        return batches(100, 10, 100, seed).samples(step).tolist()

    assert first(0, 0) != first(10, 0)
    assert first(10, 0) != first(0, 1)


@given(st.integers(8, 90), st.integers(2, 8), st.integers(2, 8), st.integers(0, 40), st.integers(0, 3))
def test_another_batch_size_goes_on_at_the_same_image(count: int, size: int, other: int, taken: int, more: int) -> None:
    """No image of the epoch is given twice, and only what makes no full batch is left out; later epochs are those of any run."""
    before = batches(count, size, 100)
    position, epoch = before.position(taken), before.clock(taken).epoch
    seen = [i for s in range(epoch * before.steps_per_epoch, taken) for i in before.samples(s).tolist()]
    after = batches(count, other, 100)
    step = start = after.resume(position, taken, in_steps=False)
    while after.clock(step).epoch == epoch:
        seen += after.samples(step).tolist()
        step += 1
    assert len(set(seen)) == len(seen) > count - max(size, other) - other
    assert after.clock(start).taken == taken
    assert after.samples(step).equal(batches(count, other, 100).samples(step))
    # A run that is stopped once more goes on to the same batches.
    again = batches(count, other, 100)
    assert again.resume(after.position(start + more), taken + more, in_steps=False) == start + more
    for later in range(start + more, start + more + 3 * after.steps_per_epoch):
        assert again.samples(later).equal(after.samples(later))
        assert again.clock(later) == after.clock(later)


def test_without_a_change_a_run_goes_on_at_its_step() -> None:
    made = batches(50, 8, 24)
    for taken in range(24):
        assert made.resume(made.position(taken), taken, in_steps=taken % 2 == 0) == taken
        assert (made.offset, made.total_steps) == (0, 24)


def test_a_schedule_goes_on_at_the_share_of_samples() -> None:
    """Half of 4 epochs is half of the schedule; of a length in steps the rest is what is left of them."""
    before = batches(64, 8, 32)
    for in_steps, total in ((False, 16), (True, 24)):
        after = batches(64, 16, 32 if in_steps else 16)
        step = after.resume(before.position(16), 16, in_steps)
        assert (step, after.total_steps, after.clock(step).taken) == (8, total, 16)
        assert after.total_steps + after.offset == (32 if in_steps else 24)


def test_both_sides_of_a_pair_go_on_and_end_together() -> None:
    labeled, others, share = Images(40), Images(90), DistInfo(0, 1, torch.device("cpu"))

    def pair(size: int, total: int) -> PairedLoader:
        return PairedLoader(labeled, others, None, None, size, 3, share, total, 0, 2 * size)  # type: ignore[arg-type]

    before, after = pair(4, 20), pair(8, 10)
    seen = [i for step in range(3) for i in before.target.samples(step).tolist()]
    step = after.resume(before.position(3), 3, in_steps=False)
    left = after.total_steps - step
    first = after._of_target(step)
    assert after.target.total_steps - first == left
    seen += [i for s in range(first, after.target.steps_per_epoch) for i in after.target.samples(s).tolist()]
    assert len(set(seen)) == len(seen) == 24 + 64


@pytest.mark.parametrize(
    ("size", "total", "in_steps", "count", "word"), [
        (16, 3, False, 64, "epochs=2"), (8, 4, True, 64, "steps=16"), (8, 8, True, 64, "steps=16"), (8, 2, False, 20, "epochs=2"),
    ],
)  # fmt: skip
def test_a_change_that_leaves_nothing_to_train_is_told(
    size: int, total: int, in_steps: bool, count: int, word: str
) -> None:
    state = {"done": 8, "position": batches(64, 8, 8).position(8)}
    made = batches(count, size, total)
    with pytest.raises(ConfigError, match=f"nothing is left to train: 8 steps were taken.*{word}"):
        check_steps_left(state, made, in_steps)
    assert (made.offset, made.total_steps) == (0, total)
    check_steps_left(state, batches(count, size, 40), in_steps)
