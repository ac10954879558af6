"""Which samples a step sees: a pure function of (seed, step), sliced by process."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import TrainProgress


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    return permutation(samples, seed, "order", epoch)


def step_at(epoch: int, given: int, samples: int, batch_size: int) -> int:
    """The step of a run of this batch size that is as far as one which has given ``given`` samples of an epoch.

    What is left of the epoch makes its last steps: there are as many of them as full batches are left.

    Args:
        epoch: from 0.
        given: samples of it, over all processes, that were given before.
        samples: number of samples in the source.
        batch_size: samples of a step over all processes.
    """
    return (epoch + 1) * (samples // batch_size) - max(0, samples - given) // batch_size


def samples_of_step(
    clock: TrainProgress, samples: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1, shift: int = 0
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
        shift: samples by which the epoch's steps begin later, where a run has come into it with another batch size.

    Returns:
        int64 of shape (batch_size // processes,).
    """
    assert clock.steps_per_epoch == samples // batch_size
    assert batch_size % processes == 0
    start = clock.step % clock.steps_per_epoch * batch_size + shift
    share = batch_size // processes
    return _epoch_order(samples, seed, clock.epoch)[start + rank * share : start + (rank + 1) * share]
