"""Which samples a step sees: a pure function of (seed, step), sliced by process."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ssl_pipeline.draws import permutation
from ssl_pipeline.schedules import Clock


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    return permutation(samples, seed, "order", epoch)


def samples_of_step(
    clock: Clock, samples: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1
) -> Tensor:
    """The samples of a step that belong to a process.

    An epoch is a permutation of all samples; it is cut into global batches, and what is left over is dropped (repeating
    samples would make false negatives). Each process takes a contiguous slice of the global batch.

    Args:
        clock: the step; ``steps_per_epoch`` must be ``samples // batch_size``.
        samples: number of samples in the source.
        batch_size: samples of a step over all processes; a multiple of ``processes``.
        seed: the run's seed.
        rank: this process.
        processes: number of processes.

    Returns:
        int64 of shape (batch_size // processes,).
    """
    assert clock.steps_per_epoch == samples // batch_size
    assert batch_size % processes == 0
    start = clock.step % clock.steps_per_epoch * batch_size
    share = batch_size // processes
    return _epoch_order(samples, seed, clock.epoch)[start + rank * share : start + (rank + 1) * share]
