from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_pipeline.data.order import samples_of_step
from ssl_pipeline.schedules import Clock


@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(0, 5))
def test_an_epoch_holds_each_sample_at_most_once_and_shares_make_the_whole(
    extra: int, steps: int, processes: int, seed: int
) -> None:
    batch = 4 * processes
    samples = steps * batch + extra % batch
    epoch = []
    for step in range(steps):
        clock = Clock(step, 3 * steps, steps)
        shares = [samples_of_step(clock, samples, batch, seed, rank, processes) for rank in range(processes)]
        assert torch.equal(torch.cat(shares), samples_of_step(clock, samples, batch, seed))
        epoch += torch.cat(shares).tolist()
    assert len(set(epoch)) == len(epoch) == steps * batch


def test_epochs_and_seeds_differ() -> None:
    def first(step: int, seed: int) -> list[int]:
        return samples_of_step(Clock(step, 100, 10), 100, 10, seed).tolist()

    assert first(0, 0) != first(10, 0)
    assert first(10, 0) != first(0, 1)
