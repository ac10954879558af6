"""kNN of 10,000 queries against 60,000 rows of width 512: ours and lightly's, and the memory of each.

Both get the same rows and normalize them; lightly's takes a batch of 256 queries at a time, as its own evaluation does.
Memory is the greatest resident size of a process that does nothing else, above what it held before the call.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.metrics.knn import knn_predict
from ssl_pipeline.metrics.linear_probe import sgd_probes
from tests.benchmarks.command import run
from tests.benchmarks.loss import resident_kib

_QUERIES, _BANK, _WIDTH, _CLASSES, _K = 10_000, 60_000, 512, 10, 20
_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
Knn = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(rounds: int) -> dict[str, float]:
    """Seconds, MiB and the ratio of times (below 1: ours is faster); the probe's sweep beside them."""
    rows, sides = _rows(_QUERIES, _BANK), [_knn("ours"), _knn("lightly")]
    for side in sides:
        side(*_rows(256, 1_000))
    answers = [side(*rows) for side in sides]
    seconds = [[_seconds(side, rows) for side in sides] for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "knn.seconds": ours,
        "knn.lightly_seconds": theirs,
        "knn.time_vs_lightly": statistics.median(own / other for own, other in seconds),
        "knn.same_answers": float((answers[0] == answers[1]).float().mean()),
        "knn.peak_mib": _peak("ours"),
        "knn.lightly_peak_mib": _peak("lightly"),
        "probe.sweep_seconds": statistics.median(_sweep() for _ in range(rounds)),
    }


def _rows(queries: int, bank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy rows about a center per class: queries, bank and the bank's labels."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(_CLASSES, _WIDTH, generator=generator)
    labels = torch.arange(bank) % _CLASSES
    every = torch.randn(queries + bank, _WIDTH, generator=generator)
    every[:queries].add_(centers[torch.arange(queries) % _CLASSES], alpha=0.2)
    every[queries:].add_(centers[labels], alpha=0.2)
    return every[:queries], every[queries:], labels


def _knn(name: str) -> Knn:
    if name == "ours":
        return lambda queries, bank, labels: knn_predict(queries, bank, labels, _CLASSES, _K)
    from lightly.utils.benchmarking import knn_predict as lightlys

    def theirs(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
        columns = F.normalize(bank, dim=1).T
        parts = F.normalize(queries, dim=1).split(256)
        return torch.cat([lightlys(part, columns, labels, _CLASSES, knn_k=_K, knn_t=0.1)[:, 0] for part in parts])

    return theirs


def _seconds(knn: Knn, rows: tuple[Tensor, Tensor, Tensor]) -> float:
    began = time.perf_counter()
    knn(*rows)
    return time.perf_counter() - began


def _sweep() -> float:
    """Seconds to train a probe at five rates on 10,000 rows, and to choose one on 2,000 others."""
    rows, _, _ = _rows(12_000, 1)
    labels = torch.arange(12_000) % _CLASSES
    began = time.perf_counter()
    probes = sgd_probes(rows[:10_000], labels[:10_000], _CLASSES, _RATES)
    probes.choose(rows[10_000:], labels[10_000:])
    return time.perf_counter() - began


def _peak(name: str) -> float:
    words = [sys.executable, "-c", f"from tests.benchmarks.knn import print_peak; print_peak({name!r})"]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str) -> None:
    """Prints the MiB that one call needs above what the process and its rows hold already."""
    knn, rows = _knn(name), _rows(_QUERIES, _BANK)
    knn(*_rows(256, 1_000))
    before = resident_kib("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 (the kernel's reset of the greatest size)
        file.write("5")
    knn(*rows)
    sys.stdout.write(f"{(resident_kib('VmHWM') - before) / 1024:.1f}\n")


if __name__ == "__main__":
    run(measure, __doc__)
