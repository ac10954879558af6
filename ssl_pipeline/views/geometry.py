"""Where a view comes from: which box of the image, mirrored or not, and how it is resized.

A crop followed by an antialiased resize and a mirror is linear and separable: one matrix for the rows, one for the
columns. A batch of equal-sized images is therefore cropped, resized and mirrored by two batched matrix products on the
device. Files of different sizes go through Pillow in the workers, with the same boxes from the same draws.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from ssl_pipeline.config.base import Strict
from ssl_pipeline.draws import Draws

_ATTEMPTS = 10

Share = Annotated[float, Field(gt=0, le=1)]


class CropConfig(Strict):
    """The random resized crop (Szegedy et al. 2015).

    Attributes:
        scale: the least and the greatest share of the image's area.
        ratio: the least and the greatest width ÷ height.
    """

    scale: tuple[Share, Share] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"write the smaller bound first, both above 0; got {list(value)}.")
        return value


def crop_boxes(draws: Draws, heights: Tensor, widths: Tensor, crop: CropConfig) -> Tensor:
    """Draws one box a sample; the same function serves both paths.

    As torchvision does, up to ten boxes of a random area and shape are tried, and the first that fits is taken; if none
    does, the largest central box of an allowed shape. All attempts of all samples are drawn at once.

    Args:
        draws: the samples' named draws, on the CPU (float rounding must not depend on the device).
        heights: image heights in pixels, int64 of shape (B,).
        widths: image widths in pixels, int64 of shape (B,).
        crop: bounds.

    Returns:
        int64 of shape (B, 4): top, left, height, width.
    """
    area = (heights * widths).double()
    log_ratio = (math.log(crop.ratio[0]), math.log(crop.ratio[1]))
    shares = torch.stack([draws.uniform(f"crop area {i}", *crop.scale) for i in range(_ATTEMPTS)], 1).double()
    ratios = torch.stack([draws.uniform(f"crop ratio {i}", *log_ratio) for i in range(_ATTEMPTS)], 1).double().exp()
    box_w = (area[:, None] * shares * ratios).sqrt().round().long()
    box_h = (area[:, None] * shares / ratios).sqrt().round().long()
    fits = (box_w > 0) & (box_h > 0) & (box_w <= widths[:, None]) & (box_h <= heights[:, None])
    first = fits.int().argmax(1, keepdim=True)
    shape = (widths / heights).double().clamp(*crop.ratio)  # the fallback's: the image's own, if it is allowed
    fallback_w = torch.minimum(widths, (heights * shape).round().long())
    fallback_h = torch.minimum(heights, (widths / shape).round().long())
    found = fits.any(1)
    height = torch.where(found, box_h.gather(1, first)[:, 0], fallback_h)
    width = torch.where(found, box_w.gather(1, first)[:, 0], fallback_w)
    free_h, free_w = heights - height, widths - width
    top = torch.where(found, (draws.uniform("crop top").double() * (free_h + 1)).long(), free_h // 2)
    left = torch.where(found, (draws.uniform("crop left").double() * (free_w + 1)).long(), free_w // 2)
    return torch.stack([top, left, height, width], 1)


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
    device = start.device
    step = (length.float() / target)[:, None, None]
    place = (torch.arange(target, device=device) + 0.5)[None, :, None] * step + (start.float() - 0.5)[:, None, None]
    pixel = torch.arange(source, device=device)[None, None, :]
    weights = (1 - (pixel - place).abs() / step.clamp_min(1.0)).clamp_min_(0)
    outside = (pixel < start[:, None, None]) | (pixel >= (start + length)[:, None, None])
    weights = weights.masked_fill_(outside, 0)
    weights = weights / weights.sum(2, keepdim=True)
    return weights if mirrored is None else torch.where(mirrored[:, None, None], weights.flip(1), weights)


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Applies one matrix to the rows and one to the columns of each image.

    Args:
        images: float of shape (B, C, H, W).
        rows: float of shape (B, h, H).
        columns: float of shape (B, w, W).

    Returns:
        float of shape (B, C, h, w).
    """
    count, channels, height, width = images.shape
    out_h, out_w = rows.shape[1], columns.shape[1]
    across = torch.bmm(images.reshape(count, channels * height, width), columns.transpose(1, 2))
    across = across.reshape(count, channels, height, out_w).transpose(1, 2).reshape(count, height, channels * out_w)
    return torch.bmm(rows, across).reshape(count, out_h, channels, out_w).transpose(1, 2)


def resize_boxes(pixels: Tensor, boxes: Tensor, size: int, mirrored: Tensor | None = None) -> Tensor:
    """Crops, resizes and mirrors equal-sized images on their device.

    Args:
        pixels: uint8 of shape (B, C, H, W).
        boxes: int64 of shape (B, 4).
        size: the view's height and width.
        mirrored: bool of shape (B,).

    Returns:
        float32 in [0, 1] of shape (B, C, size, size).
    """
    top, left, height, width = boxes.to(pixels.device).unbind(1)
    mirrored = None if mirrored is None else mirrored.to(pixels.device)
    rows = resize_matrix(top, height, pixels.shape[2], size)
    columns = resize_matrix(left, width, pixels.shape[3], size, mirrored)
    return separable(pixels.float().div_(255), rows, columns)


def resize_box_of_file(image: Image.Image, box: Tensor, size: int, mirrored: bool = False) -> Tensor:
    """The same for one decoded file, by Pillow: uint8 of shape (C, size, size).

    A box of an image that was decoded at a fraction of its size may lie between pixels.
    """
    top, left, height, width = (float(value) for value in box)
    x, y = math.floor(left), math.floor(top)
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inner = (left - x, top - y, right - x, bottom - y)
    view = part.resize((size, size), Image.Resampling.BILINEAR, box=inner)
    if mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flat = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8)
    return flat.reshape(size, size, -1).permute(2, 0, 1).contiguous()


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
