"""What it costs to look whether every gradient is a finite number, against a step's forward and backward pass.

Of one view of 64 images of 32 px, on one thread: a step so small for its network that the look shows. ``norm`` is torch's own
of all gradients, which would tell it as well. The three alternate, and medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.utils import get_total_norm

from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.train_state import gradient_check
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from tests.benchmarks.command import run

_IMAGES, _SIZE, _LOOKS = 64, 32, 5


def measure(rounds: int) -> dict[str, float]:
    """Milliseconds of a ResNet-18 and of a small ResNet, each with the stem for large images, and shares of the step."""
    device, threads = start_accelerator().device, torch.get_num_threads()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name in ("resnet18", "small_resnet"):
        blueprint = EncoderSpec(
            backbone=BackboneConfig(name=name, stem="imagenet"), neck=NeckConfig(), channels=3, size=_SIZE,
            mean=(0.5,) * 3, std=(0.25,) * 3,
        )  # fmt: skip
        encoder = blueprint.build()[0].to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.randn(_IMAGES, 3, _SIZE, _SIZE, device=device).to(memory_format=torch.channels_last)

        def step(encoder: torch.nn.Module = encoder, images: torch.Tensor = images) -> torch.Tensor:
            encoder.zero_grad()
            loss: torch.Tensor = encoder(images).square().mean()
            loss.backward()
            return loss

        def norm(encoder: torch.nn.Module = encoder) -> torch.Tensor:
            return get_total_norm([p.grad for p in encoder.parameters() if p.grad is not None])

        def check(encoder: torch.nn.Module = encoder) -> torch.Tensor:
            return gradient_check(encoder.parameters())

        _milliseconds(step)
        took: dict[str, list[float]] = {"step": [], "norm": [], "check": []}
        for _ in range(rounds):
            took["step"].append(_milliseconds(step))
            for _ in range(_LOOKS):
                took["norm"].append(_milliseconds(norm))
                took["check"].append(_milliseconds(check))
        medians = {what: statistics.median(values) for what, values in took.items()}
        figures |= {f"numbers.{name}.{what}_ms": value for what, value in medians.items()}
        figures[f"numbers.{name}.check_percent"] = 100 * medians["check"] / medians["step"]
        figures[f"numbers.{name}.norm_percent"] = 100 * medians["norm"] / medians["step"]
    torch.set_num_threads(threads)
    return figures


def _milliseconds(work: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    work().item()  # waits for the device
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    run(measure, __doc__)
