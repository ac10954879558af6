"""InfoNCE against lightly's NT-Xent and pytorch-metric-learning's: time, memory, and the gradient's error.

Speed alternates within one process. Memory is the greatest resident size of a process that does nothing else, above what it
held before the call. Errors are measured against the same loss in fp64.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.train_state import two_pass
from ssl_pipeline.losses.info_nce import normalize_rows, two_view_info_nce
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretext import simclr
from ssl_pipeline.schedules import TrainProgress
from tests.benchmarks.command import run

_WIDTH, _TEMPERATURE, _IMAGES = 128, 0.1, 128
Loss = Callable[[Tensor, Tensor], Tensor]


def measure(rounds: int) -> dict[str, float]:
    """Seconds, MiB and ratios, forward and backward together, on random rows of width 128."""
    figures: dict[str, float] = {}
    ours, lightlys = _side_by_side(["ours", "lightly"], 16_384, rounds)
    figures |= {"loss.seconds_16384": ours, "loss.lightly_seconds_16384": lightlys}
    figures["loss.speedup_vs_lightly"] = lightlys / ours
    small, theirs = _side_by_side(["ours", "metric_learning"], 512, 20 * rounds)
    figures["loss.speedup_vs_metric_learning_512"] = theirs / small
    figures["loss.speedup_vs_lightly_512"] = _ratio("lightly", 512, 20 * rounds)
    for rows in (8_192, 32_768, 65_536):
        figures[f"loss.seconds_{rows}"] = _seconds("ours", rows)
    for rows in (8_192, 16_384, 32_768, 65_536):
        figures[f"loss.peak_mib_{rows}"] = _peak("ours", rows)
    figures["loss.lightly_peak_mib_16384"] = _peak("lightly", 16_384)
    figures["loss.memory_vs_lightly"] = figures["loss.peak_mib_16384"] / figures["loss.lightly_peak_mib_16384"]
    figures["loss.grad_rel_err"] = _error(two_view_info_nce, _random_rows(4_096, torch.float64), 0.1)
    pairs = _aligned_rows(4_096)
    figures["loss.grad_rel_err_aligned"] = _error(two_view_info_nce, pairs, 0.05)
    figures["loss.grad_rel_err_aligned_dense"] = _error(_dense, pairs, 0.05)
    figures["loss.two_pass_overhead"] = _two_pass(rounds)
    return figures


def _loss(name: str) -> Loss:
    if name == "lightly":
        from lightly.loss import NTXentLoss

        lightlys: Loss = NTXentLoss(temperature=_TEMPERATURE)
        return lightlys
    if name == "metric_learning":
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearning

        metric = MetricLearning(temperature=_TEMPERATURE)

        def theirs(first: Tensor, second: Tensor) -> Tensor:
            place = torch.arange(len(first)).repeat(2)
            loss: Tensor = metric(torch.cat([first, second]), place)
            return loss

        return theirs
    return lambda first, second: two_view_info_nce(first, second, _TEMPERATURE)


def _random_rows(rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(rows, _WIDTH, generator=generator, dtype=dtype).chunk(2))


def _aligned_rows(rows: int) -> list[Tensor]:
    first, noise = _random_rows(rows, torch.float64)
    return [first, first + 0.01 * noise]


def _step(loss: Loss, pair: list[Tensor]) -> float:
    pair = [rows.clone().requires_grad_() for rows in pair]
    began = time.perf_counter()
    loss(*pair).backward()
    return time.perf_counter() - began


def _side_by_side(names: list[str], rows: int, rounds: int) -> list[float]:
    """Median seconds of each, one after another in every round."""
    losses, pair = [_loss(name) for name in names], _random_rows(rows)
    for loss in losses:
        _step(loss, _random_rows(512))
    seconds = [[_step(loss, pair) for loss in losses] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def _ratio(name: str, rows: int, rounds: int) -> float:
    ours, theirs = _side_by_side(["ours", name], rows, rounds)
    return theirs / ours


def _seconds(name: str, rows: int) -> float:
    return _side_by_side([name], rows, 1)[0]


def _peak(name: str, rows: int) -> float:
    """MiB above the inputs, in a process of its own."""
    words = [sys.executable, "-c", f"from tests.benchmarks.loss import print_peak; print_peak({name!r}, {rows})"]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str, rows: int) -> None:
    """Prints the MiB that one forward and backward needs above what the process and its inputs hold already."""
    loss, pair = _loss(name), _random_rows(rows)
    _step(loss, _random_rows(512))
    before = resident_kib("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 (the kernel's reset of the greatest size)
        file.write("5")
    _step(loss, pair)
    sys.stdout.write(f"{(resident_kib('VmHWM') - before) / 1024:.1f}\n")


def resident_kib(key: str) -> int:
    """A figure of this process by the kernel: ``VmRSS`` (now) or ``VmHWM`` (the greatest), in KiB."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def _two_pass(rounds: int) -> float:
    """Seconds of a step of the two-pass form ÷ those of the plain step: ResNet-18 at 32 px, 128 images, micro-batches of 32."""
    source = ArrayDataset("random images", torch.zeros(_IMAGES, 3, 32, 32, dtype=torch.uint8))
    blueprint = EncoderSpec(
        backbone=BackboneConfig(name="resnet18"),
        neck=NeckConfig(),
        channels=3,
        size=32,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    task = simclr.Config(name="simclr").build(blueprint.build()[0], source)
    accelerator = start_accelerator()
    task = task.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = [torch.randn(_IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    batch = Batch(TrainProgress(0, 1, 1), torch.arange(_IMAGES), [view.to(accelerator.device) for view in views])

    def plain() -> None:
        task(batch).loss.backward()

    def in_two() -> None:
        two_pass(task, task, batch, _IMAGES // 4, accelerator, lambda _: None)

    seconds = []
    for _ in range(rounds + 1):
        pair = []
        for step in (plain, in_two):
            began = time.perf_counter()
            step()
            pair.append(time.perf_counter() - began)
        seconds.append(pair)
    return statistics.median(other / one for one, other in seconds[1:])


def _dense(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The textbook's form: the whole matrix, and cross-entropy."""
    rows = normalize_rows(torch.cat([first, second]))
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    place = torch.arange(len(rows))
    return torch.nn.functional.cross_entropy(logits, (place + len(first)) % len(rows))


def _error(loss: Callable[[Tensor, Tensor, float], Tensor], pair: list[Tensor], temperature: float) -> float:
    """‖g − g64‖ ÷ ‖g64‖, with g from the rows rounded to fp32 and g64 from the same rows in fp64."""
    first, second = (rows.float().requires_grad_() for rows in pair)
    exact_first, exact_second = (rows.detach().double().requires_grad_() for rows in (first, second))
    rounded = torch.autograd.grad(loss(first, second, temperature), [first, second])
    exact = torch.autograd.grad(two_view_info_nce(exact_first, exact_second, temperature), [exact_first, exact_second])
    found, truth = torch.cat(rounded).double(), torch.cat(exact)
    return float((found - truth).norm() / truth.norm())


if __name__ == "__main__":
    run(measure, __doc__)
