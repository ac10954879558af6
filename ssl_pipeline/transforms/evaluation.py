"""The evaluation transform of published weights, in two forms that agree: Pillow's for files, matrices for tensors.

Files go through Pillow, as they do in torchvision's and timm's own evaluation, so that each pixel is what these libraries give.
Batches of equal-sized images, and exported graphs, take one matrix for the columns and one for the rows: the same filters, with
Pillow's rounding to whole bytes after each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.models.resize import Resize


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, which Pillow and torch use where they antialias."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).float()


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * (math.pi * x).cos()), 0.0)


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "lanczos": _lanczos,
    "box": _box,
    "hamming": _hamming,
}


def resized_sizes(heights: Tensor, widths: Tensor, resize: Resize) -> tuple[Tensor, Tensor]:
    """Heights and widths after the resize, before the crop; int64 in and out."""
    target = resize.resize_size
    if resize.crop_mode == "squash":
        return torch.full_like(heights, target), torch.full_like(widths, target)
    if resize.crop_mode == "border":
        ratio = torch.maximum(heights, widths).double() / target
        return (heights / ratio).round().long(), (widths / ratio).round().long()
    shorter = torch.minimum(heights, widths)
    return target * heights // shorter, target * widths // shorter


def crop_start(resized: Tensor, size: int) -> Tensor:
    """Where the central crop begins, rounded as torchvision rounds; negative where the image is smaller and is padded."""
    return torch.where(resized < size, -((size - resized) // 2), ((resized - size) / 2).round().long())


def resize_and_crop(pixels: Tensor, size: int, resize: Resize, fill: Tensor) -> Tensor:
    """Equal-sized images, on their device.

    Args:
        pixels: uint8 of shape (B, C, H, W); H and W may be symbols of a graph that is traced.
        size: the network's height and width.
        resize: how.
        fill: the color of a border, in [0, 1], of shape (C, 1, 1).

    Returns:
        float32 in [0, 1] of shape (B, C, size, size).
    """
    height, width = pixels.shape[2:]
    heights, widths = (torch.full((1,), side, device=pixels.device) for side in (height, width))
    resized = resized_sizes(heights, widths, resize)
    rows = _matrix(height, heights, resized[0], size, resize.interpolation)
    columns = _matrix(width, widths, resized[1], size, resize.interpolation)
    across = torch.matmul(pixels.float(), columns.T).round().clamp(0, 255)
    views = torch.matmul(rows, across).round().clamp(0, 255) / 255
    if resize.crop_mode != "border":
        return views
    covered = rows.sum(1)[:, None] * columns.sum(1)
    color = (fill.to(views) * 255).round() / 255
    return views + color * (1 - covered)


def _matrix(source: int, length: Tensor, resized: Tensor, size: int, interpolation: str) -> Tensor:
    """float32 (size, source): the pixels of the crop as weighted sums of the image's; rows of a border are 0."""
    place = torch.arange(size, device=length.device) + crop_start(resized, size)
    step = length.double() / resized  # a pixel's place decides by a hair which of two is the nearest
    middle = (place + 0.5) * step
    pixel = torch.arange(source, device=length.device)
    if interpolation == "nearest":
        weights = (pixel == middle.floor()[:, None]).float()
    else:
        weights = _FILTERS[interpolation](((pixel + 0.5 - middle[:, None]) / step.clamp_min(1)).float())
        weights = weights / weights.sum(1, keepdim=True)
    inside = (place >= 0) & (place < resized)
    return torch.where(inside[:, None], weights, 0.0)


def resize_and_crop_image(image: Image.Image, size: int, resize: Resize, fill: tuple[float, ...]) -> Image.Image:
    """One decoded image, by Pillow.

    Args:
        image: of mode ``L`` or ``RGB``, or grayscale in [0, 1] of mode ``F``.
        size: the network's height and width.
        resize: how.
        fill: the color of a border, in [0, 1], a value a channel.
    """
    heights, widths = resized_sizes(torch.tensor([image.height]), torch.tensor([image.width]), resize)
    top, left = int(crop_start(heights, size)), int(crop_start(widths, size))
    resized = image.resize((int(widths), int(heights)), Image.Resampling[resize.interpolation.upper()])
    if top >= 0 and left >= 0:
        return resized.crop((left, top, left + size, top + size))
    color = fill if resize.crop_mode == "border" else (0.0,) * len(fill)
    paint: float | tuple[int, ...] = sum(color) / len(color)
    if image.mode != "F":
        paint = tuple(round(255 * value) for value in color)
        paint = paint if len(paint) > 1 else paint[0]
    canvas = Image.new(image.mode, (size, size), paint)
    canvas.paste(resized, (-left, -top))
    return canvas


def as_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) of a decoded image: uint8, or float32 where it has more than 8 bits."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
