"""The parts of an evaluation, from all processes: the one place where it can be cut short without one waiting for another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch.distributed as dist

from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.engine.signals import CutShortError, overdue

T = TypeVar("T")


def gather_parts(parts: Iterable[T], share: DistInfo) -> list[T]:
    """Makes this process's parts, and gathers all processes'.

    Args:
        parts: of this process, made one by one; a signal is looked for between them.
        share: this process's share.

    Returns:
        All parts, by rank, the same on every process.

    Raises:
        CutShortError: on every process, when one of them was told to stop.
    """
    mine, signal = list[T](), 0
    for part in parts:
        mine.append(part)
        signal = overdue()
        if signal:
            break
    everyones = [(signal, mine)]
    if share.processes > 1:
        everyones *= share.processes
        dist.all_gather_object(everyones, (signal, mine))
    stopped = max(number for number, _ in everyones)
    if stopped:
        raise CutShortError(stopped)
    return [part for _, parts_of_rank in everyones for part in parts_of_rank]
