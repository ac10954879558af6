"""Where a view comes from: which box of the image, mirrored or not, and how it is resized.

A crop followed by an antialiased resize and a mirror is linear and separable: one matrix for the rows, one for the
columns. A batch of equal-sized images on an accelerator is therefore cropped, resized and mirrored by two batched matrix
products. On a CPU that is the fastest for small images alone; large ones, and files of different sizes in the workers, go
through torch's resize for bytes, one by one. All have the same boxes from the same draws, and the same weights.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.rng import NamedRNG

_ATTEMPTS = 10
_SMALL = 48  # pixels up to which matrices are the faster way on a CPU
_CACHE = 300_000  # values of float32, 1.2 MB: what a core's second cache usually has room for

Share = Annotated[float, Field(gt=0, le=1)]


class BoxConfig(FrozenModel):
    """Bounds of a random box.

    Attributes:
        scale: the least and the greatest share of the image's area.
        ratio: the least and the greatest width ÷ height.
    """

    scale: tuple[Share, Share]
    ratio: tuple[float, float]

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"write the smaller bound first, both above 0; got {list(value)}.")
        return value


class CropConfig(BoxConfig):
    """The random resized crop (Szegedy et al. 2015)."""

    scale: tuple[Share, Share] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


def random_boxes(
    draws: NamedRNG, name: str, heights: Tensor, widths: Tensor, config: BoxConfig
) -> tuple[Tensor, Tensor]:
    """Draws one box a sample.

    As torchvision does, up to ten boxes of a random area and shape are tried, and the first that fits is taken. All
    attempts of all samples are drawn at once.

    Args:
        draws: the samples' named draws, on the CPU (float rounding must not depend on the device).
        name: what the box is for; its draws' first word.
        heights: image heights in pixels, int64 of shape (B,).
        widths: image widths in pixels, int64 of shape (B,).
        config: bounds.

    Returns:
        int64 of shape (B, 4): top, left, height, width; and bool of shape (B,): whether any fitted.
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
    """One box to crop a sample; the same function serves both paths.

    Where no random box fits it is the largest central one of an allowed shape, as torchvision's.

    Args:
        draws: the samples' named draws, on the CPU.
        heights: image heights in pixels, int64 of shape (B,).
        widths: image widths in pixels, int64 of shape (B,).
        crop: bounds.

    Returns:
        int64 of shape (B, 4): top, left, height, width.
    """
    boxes, fit = random_boxes(draws, "crop", heights, widths, crop)
    shape = (widths / heights).double().clamp(*crop.ratio)  # the image's own, if it is allowed
    width = torch.minimum(widths, (heights * shape).round().long())
    height = torch.minimum(heights, (widths / shape).round().long())
    central = torch.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)
    return torch.where(fit[:, None], boxes, central)


def central_boxes(heights: Tensor, widths: Tensor) -> Tensor:
    """The largest central square of each image, int64 of shape (B, 4): what evaluation looks at."""
    side = torch.minimum(heights, widths)
    return torch.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int, mirrored: Tensor | None = None) -> Tensor:
    """The matrix that resizes ``source`` pixels' stretch [start, start + length) to ``target`` pixels.

    A triangle filter as wide as an output pixel, at least as wide as an input pixel: bilinear when enlarging,
    antialiased when shrinking, cut at the box's edge. These are the weights of Pillow and torchvision.

    Args:
        start: first pixel of the stretch, int64 of shape (B,).
        length: its length, int64 of shape (B,).
        source: pixels of the image along this axis.
        target: pixels of the view along this axis.
        mirrored: which samples to mirror, bool of shape (B,).

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
    """Crops, resizes and mirrors equal-sized images on their device, by a matrix for the rows and one for the columns.

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


def resize_boxes_on_cpu(pixels: Tensor, boxes: Tensor, size: int, mirrored: Tensor) -> Tensor:
    """The same where it is fastest on a CPU: small images by matrices, large ones one by one by torch's kernel for bytes.

    Args:
        pixels: uint8 of shape (B, C, H, W), on the CPU.
        boxes: int64 of shape (B, 4).
        size: the view's height and width.
        mirrored: bool of shape (B,).

    Returns:
        float32 in [0, 1] or uint8, of shape (B, C, size, size).
    """
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


def resize_box_of_file(image: Image.Image, box: Tensor, size: int, mirrored: bool = False) -> Tensor:
    """The same for one decoded file: of shape (C, size, size), uint8, or float32 if it has more than 8 bits.

    A box of an image that was decoded at a fraction of its size may lie between pixels: then Pillow resizes it, which takes
    three times as long as torch's kernel for bytes.
    """
    if bool((box != box.round()).any()):
        return _resize_between_pixels(image, box, size, mirrored)
    top, left, height, width = (int(value) for value in box)
    part = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
    return _resize_bytes(part.reshape(height, width, -1).permute(2, 0, 1), size, mirrored).contiguous()


def _resize_between_pixels(image: Image.Image, box: Tensor, size: int, mirrored: bool) -> Tensor:
    top, left, height, width = (float(value) for value in box)
    x, y = math.floor(left), math.floor(top)
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inner = (left - x, top - y, right - x, bottom - y)
    view = torch.from_numpy(np.array(part.resize((size, size), Image.Resampling.BILINEAR, box=inner)))
    view = view.reshape(size, size, -1).permute(2, 0, 1)
    return (view.flip(2) if mirrored else view).contiguous()


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
    """A batch on a CPU in parts for whose operations a core's cache has room; on another device the whole batch."""
    most = max(1, _CACHE // images[0].numel()) if images.device.type == "cpu" else len(images)
    count = math.ceil(len(images) / math.ceil(len(images) / most))
    return [slice(start, start + count) for start in range(0, len(images), count)]


def reductions(boxes: Tensor, size: int) -> Tensor:
    """By how much an image may be shrunk so that its box still has the view's pixels: 1, 2, 4 or 8.

    Args:
        boxes: int64 of shape (B, 4).
        size: the view's height and width.

    Returns:
        int64 of shape (B,).
    """
    side = torch.minimum(boxes[:, 2], boxes[:, 3])
    return 1 + (side >= 2 * size).long() + 2 * (side >= 4 * size) + 4 * (side >= 8 * size)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates square views about their center, counter-clockwise, bilinear.

    What lies outside is mirrored: black corners would tell a network the angle.

    Args:
        images: float of shape (B, C, S, S).
        degrees: float of shape (B,).

    Returns:
        float of the same shape.
    """
    angle = torch.deg2rad(degrees)
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, none], 1), torch.stack([sin, cos, none], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def erase_(images: Tensor, boxes: Tensor) -> None:
    """Sets a box of each image to 0, in place.

    Args:
        images: float of shape (B, C, H, W).
        boxes: int64 of shape (B, 4); a box of height 0 erases nothing.
    """
    top, left, height, width = boxes[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows = (row >= top) & (row < top + height)
    columns = (column >= left) & (column < left + width)
    images.mul_(~(rows[:, None, :, None] & columns[:, None, None, :]))
