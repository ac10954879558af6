"""Which box of an image a view shows, and how the box is resized and mirrored.

Crop, antialiased resize and mirror are one linear, separable map: a matrix for the rows and one for the columns. A batch of
equal-sized images on an accelerator takes two batched matrix products. On a CPU that is fastest for small images only: large
ones, and files of different sizes, go one by one through torch's resize of bytes. All take the same boxes and weights.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms.config import BoxConfig, CropConfig

_ATTEMPTS = 10
_SMALL = 48  # pixels up to which matrices are the faster way on a CPU
_CACHE = 300_000  # values of float32, 1.2 MB: what a core's second cache usually has room for


def random_boxes(
    draws: NamedRNG, name: str, heights: Tensor, widths: Tensor, config: BoxConfig
) -> tuple[Tensor, Tensor]:
    """Draws one box per sample: the first of ten random ones that fits, as torchvision does, all drawn at once.

    Args:
        draws: on the CPU, since float rounding must not depend on the device.
        name: first word of the draws' names.
        heights: of the images in pixels, int64 of shape (B,).
        widths: of the images in pixels, int64 of shape (B,).
        config: bounds.

    Returns:
        int64 of shape (B, 4): top, left, height, width; and bool of shape (B,): whether any fits.
    """
    area = (heights * widths).double()
    log_ratio = (math.log(config.ratio[0]), math.log(config.ratio[1]))
    shares = draws.uniforms([f"{name} area {i}" for i in range(_ATTEMPTS)], *config.scale).double()
    ratios = draws.uniforms([f"{name} ratio {i}" for i in range(_ATTEMPTS)], *log_ratio).double().exp()
    box_w = (area[:, None] * shares * ratios).sqrt().round().long()
    box_h = (area[:, None] * shares / ratios).sqrt().round().long()
    fits = (box_w > 0) & (box_h > 0) & (box_w <= widths[:, None]) & (box_h <= heights[:, None])
    first = fits.int().argmax(1, keepdim=True)
    height, width = box_h.gather(1, first)[:, 0], box_w.gather(1, first)[:, 0]
    top = (draws.uniform(f"{name} top").double() * (heights - height + 1)).long()
    left = (draws.uniform(f"{name} left").double() * (widths - width + 1)).long()
    return torch.stack([top, left, height, width], 1), fits.any(1)


def crop_boxes(draws: NamedRNG, heights: Tensor, widths: Tensor, crop: CropConfig) -> Tensor:
    """The random resized crop's box per sample, int64 of shape (B, 4).

    Where no random box fits it is the largest central one of an allowed ratio, as in torchvision.
    """
    boxes, fit = random_boxes(draws, "crop", heights, widths, crop)
    ratio = (widths / heights).double().clamp(*crop.ratio)
    width = torch.minimum(widths, (heights * ratio).round().long())
    height = torch.minimum(heights, (widths / ratio).round().long())
    central = torch.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)
    return torch.where(fit[:, None], boxes, central)


def central_boxes(heights: Tensor, widths: Tensor) -> Tensor:
    """The largest central square of each image, int64 of shape (B, 4)."""
    side = torch.minimum(heights, widths)
    return torch.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)


def whole_boxes(heights: Tensor, widths: Tensor) -> Tensor:
    """All of each image, int64 of shape (B, 4)."""
    return torch.stack([torch.zeros_like(heights), torch.zeros_like(heights), heights, widths], 1)


def reductions(boxes: Tensor, size: int) -> Tensor:
    """By how much an image may shrink so that its box keeps the view's pixels: 1, 2, 4 or 8, int64 of shape (B,)."""
    side = torch.minimum(boxes[:, 2], boxes[:, 3])
    return 1 + (side >= 2 * size).long() + 2 * (side >= 4 * size) + 4 * (side >= 8 * size)


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int, mirrored: Tensor | None = None) -> Tensor:
    """The matrix that resizes pixels [start, start + length) of ``source`` to ``target`` pixels.

    A triangle filter as wide as an output pixel, at least as wide as an input pixel: bilinear when enlarging,
    antialiased when shrinking, cut at the box's edge. These are the weights of Pillow and torchvision.

    ``start`` and ``length`` are int64 of shape (B,), ``mirrored`` is bool of that shape.

    Returns:
        float32 of shape (B, target, source); each row sums to 1.
    """
    pixel = torch.arange(source, device=start.device)
    step = length.float() / target
    place = (torch.arange(target, device=start.device) + 0.5) * step[:, None] + (start.float() - 0.5)[:, None]
    if mirrored is not None:
        place = torch.where(mirrored[:, None], place.flip(1), place)
    sharpness = -1 / step.clamp_min(1.0)
    weights = (pixel - place[:, :, None]).abs_().mul_(sharpness[:, None, None]).add_(1).clamp_min_(0)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights.mul_(inside[:, None].float())
    return weights.div_(weights.sum(2, keepdim=True))


def resize_boxes(pixels: Tensor, boxes: Tensor, size: int, mirrored: Tensor | None = None) -> Tensor:
    """Crops, resizes and mirrors equal-sized images by matrices, on their device.

    Args:
        pixels: uint8 of shape (B, C, H, W).
        boxes: int64 of shape (B, 4).
        size: the view's height and width.
        mirrored: bool of shape (B,).

    Returns:
        float32 in [0, 1] of shape (B, C, size, size).
    """
    count, channels, source_height, source_width = pixels.shape
    top, left, height, width = boxes.to(pixels.device).unbind(1)
    mirrored = None if mirrored is None else mirrored.to(pixels.device)
    rows = resize_matrix(top, height, source_height, size).div_(255)
    columns = resize_matrix(left, width, source_width, size, mirrored)
    lines = pixels.reshape(count, channels * source_height, source_width).float()
    across = torch.bmm(lines, columns.transpose(1, 2)).reshape(count, channels, source_height, size)
    return torch.matmul(rows[:, None], across)


def resize_boxes_fast(pixels: Tensor, boxes: Tensor, size: int, mirrored: Tensor) -> Tensor:
    """:func:`resize_boxes` by the fastest way for the device: uint8 for large images on a CPU, float32 otherwise."""
    if pixels.device.type != "cpu":
        return resize_boxes(pixels, boxes, size, mirrored)
    if max(size, *pixels.shape[2:]) <= _SMALL:
        views = torch.empty((*pixels.shape[:2], size, size))
        with torch.inference_mode():
            for rows in cache_parts(pixels):
                views[rows] = resize_boxes(pixels[rows], boxes[rows], size, mirrored[rows])
        return views
    views = pixels.new_empty((*pixels.shape[:2], size, size))
    for view, image, box, mirror in zip(views, pixels, boxes.tolist(), mirrored.tolist(), strict=True):
        top, left, height, width = box
        view.copy_(_resize_bytes(image[:, top : top + height, left : left + width], size, mirror))
    return views


def resize_box_of_image(image: Image.Image, box: Tensor, size: int, mirrored: bool = False) -> Tensor:
    """The box of one decoded file, of shape (C, size, size): uint8, or float32 if it has more than 8 bits.

    A box of an image that was decoded at a fraction of its size may lie between pixels. Pillow resizes such a box, which
    takes three times as long as torch's resize of bytes.
    """
    between = bool((box != box.round()).any())
    top, left, height, width = box.tolist()
    bottom, right = min(top + height, image.height), min(left + width, image.width)
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    if between:
        part = part.resize((size, size), Image.Resampling.BILINEAR, box=(left - x, top - y, right - x, bottom - y))
    pixels = torch.from_numpy(np.array(part)).reshape(part.height, part.width, -1).permute(2, 0, 1)
    if not between:
        return _resize_bytes(pixels, size, mirrored).contiguous()
    return (pixels.flip(2) if mirrored else pixels).contiguous()


def _resize_bytes(part: Tensor, size: int, mirrored: bool) -> Tensor:
    """uint8 or float32 (C, h, w) to (C, size, size)."""
    resized = F.interpolate(part[None], (size, size), mode="bilinear", antialias=True)[0]
    return resized.flip(2) if mirrored else resized


def stack_views(views: list[Tensor], channels: int) -> Tensor:
    """Views of one size, each (C, S, S), as a batch.

    Returns:
        uint8 of shape (B, C, S, S) if all are; otherwise float32 in [0, 1], in which grayscale views fill all ``channels``.
    """
    if all(view.dtype == torch.uint8 for view in views):
        return torch.stack(views)
    return torch.stack([as_float(view).expand(channels, -1, -1) for view in views])


def as_float(images: Tensor) -> Tensor:
    """Images in [0, 1]: bytes are divided by 255, floats are in it."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def cache_parts(images: Tensor) -> list[slice]:
    """A batch on a CPU in parts that fit a core's cache; on another device the whole batch."""
    most = max(1, _CACHE // images[0].numel()) if images.device.type == "cpu" else len(images)
    count = math.ceil(len(images) / math.ceil(len(images) / most))
    return [slice(start, start + count) for start in range(0, len(images), count)]
