"""Views against lightly's: images a second with two views of SimCLR's policy, on one thread.

Both sides do the same to each image (crop, mirror, color jitter, grayscale, blur, normalization), from images in memory: ours a
batch of bytes, lightly a PIL image each, as its data sets hand them over. torchvision's second version on tensors, and
kornia where it is installed, run beside them. All alternate within one process, so that a slow minute of a shared machine
hits all.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ssl_pipeline.transforms.config import BlurConfig, CropConfig, JitterConfig, ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.benchmarks.command import run

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CASES = ((32, 32, 256), (224, 256, 32))  # pixels of a view, pixels of an image, images
Side = Callable[[], object]


def measure(rounds: int) -> dict[str, float]:
    """Images a second at 32 px, and at 224 px from 256 px, and the ratios to lightly's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # A training process has freed large blocks before; from then on the C library keeps memory from batch to batch, where
    # a fresh process hands it back to the system and pays for each page again.
    torch.zeros(7 * 2**20)
    try:
        figures: dict[str, float] = {}
        for size, source, count in _CASES:
            figures |= _compare(size, source, count, rounds)
    finally:
        torch.set_num_threads(threads)
    return figures


def _compare(size: int, source: int, count: int, rounds: int) -> dict[str, float]:
    pixels = _pictures(count, source)
    sides = {"ours": _ours(pixels, size), "lightly": _lightly(pixels, size), "torchvision": _torchvision(pixels, size)}
    if importlib.util.find_spec("kornia"):
        sides["kornia"] = _kornia(pixels, size)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # warms allocators up
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            rates[name].append(count / (time.perf_counter() - began))
    figures = {f"views.{name}_images_per_s_{size}": statistics.median(found) for name, found in rates.items()}
    ratios = [one / other for one, other in zip(rates["ours"], rates["lightly"], strict=True)]
    return {**figures, f"transform.speedup_vs_lightly_{size}": statistics.median(ratios)}


def _pictures(count: int, side: int) -> Tensor:
    """Smooth colored pictures, uint8 of shape (count, 3, side, side): noise would have no edges, and no even parts."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp_(0, 1)
    return (smooth * 255).to(torch.uint8)


def _ours(pixels: Tensor, size: int) -> Side:
    config = ViewsConfig(
        size=size,
        crop=CropConfig(scale=(0.08, 1.0)),
        color_jitter=JitterConfig(probability=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        grayscale=0.2,
        gaussian_blur=BlurConfig(probability=0.5, sigma=(0.1, 2.0)),
    )
    views, index = Views(config, _MEAN, _STD, seed=0), torch.arange(len(pixels))
    return lambda: views.finish(views.of_pixels(pixels, index, 0), index, 0)


def _lightly(pixels: Tensor, size: int) -> Side:
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    transform = SimCLRTransform(input_size=size)
    return lambda: [torch.stack(view) for view in zip(*(transform(image) for image in images), strict=True)]


def _torchvision(pixels: Tensor, size: int) -> Side:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(max(3, size // 20 * 2 + 1), (0.1, 2.0))], 0.5),
            v2.Normalize(_MEAN, _STD),
        ]
    )
    return lambda: [torch.stack([transform(image) for image in pixels]) for _ in range(2)]


def _kornia(pixels: Tensor, size: int) -> Side:
    from kornia import augmentation

    kernel = max(3, size // 20 * 2 + 1)
    transform: Any = torch.nn.Sequential(
        augmentation.RandomResizedCrop((size, size), (0.08, 1.0)),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5),
        augmentation.Normalize(torch.tensor(_MEAN), torch.tensor(_STD)),
    )
    return lambda: [transform(pixels.float() / 255) for _ in range(2)]


if __name__ == "__main__":
    run(measure, __doc__)
