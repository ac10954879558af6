"""What evaluation and prediction do to an image: resized, cut to the network's size, normalized.

The evaluation transform of published weights comes in two forms that agree. Files go through Pillow, as in torchvision's and
timm's own evaluation, so that each pixel is what these libraries give. Batches of equal-sized images, and exported graphs,
take one matrix for the columns and one for the rows: the same filters, with Pillow's rounding to whole bytes after each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.transforms.crop import (
    as_float,
    central_boxes,
    resize_box_of_image,
    resize_boxes,
    stack_views,
    whole_boxes,
)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class Resize(FrozenModel):
    """How published weights want an image brought to their size; the network's central square is cut out afterwards.

    Attributes:
        resize_size: in pixels: of the shorter side (``center``), of the longer side (``border``) or of both (``squash``).
        interpolation: Pillow's name of the filter; all but ``nearest`` are antialiased.
        crop_mode: timm's name: ``center`` keeps the image's shape and loses its ends, ``squash`` loses its shape, ``border``
            keeps both and fills up with the mean color.
    """

    resize_size: int = Field(ge=1)
    interpolation: Interpolation = "bilinear"
    crop_mode: Literal["center", "squash", "border"] = "center"

    def describe(self, size: int) -> str:
        """In words, for an input of ``size`` pixels."""
        sides = {"center": "shorter side", "squash": "both sides", "border": "longer side, with a border,"}
        side = sides[self.crop_mode]
        return f"{side} resized to {self.resize_size} px ({self.interpolation}), central {size} px"


class InputSpec(Protocol):
    """What an encoder says of the images that it expects."""

    @property
    def size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def resize(self) -> Resize | None: ...


@dataclass(frozen=True)
class Preprocessing:
    """Turns images into what a network expects.

    Attributes:
        size: height and width of the network's input, in pixels.
        mean: per channel, of values in [0, 1]; ``std`` too.
        resize: the evaluation transform of published weights; None resizes the largest central square.
        whole: squeezes all of an image into the square instead: a dense task must not lose its ends.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize | None = None
    whole: bool = False

    @classmethod
    def of(cls, spec: InputSpec) -> Preprocessing:
        """What an encoder's card asks for."""
        return cls(spec.size, spec.mean, spec.std, spec.resize)

    def normalize(self, images: Tensor) -> Tensor:
        """(images − mean) ÷ std of images in [0, 1], (B, C, H, W)."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return images.sub(mean).div_(std)

    def _boxes(self, heights: Tensor, widths: Tensor) -> Tensor:
        return whole_boxes(heights, widths) if self.whole else central_boxes(heights, widths)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to normalized float32 (B, C, size, size), on the pixels' device."""
        if self.resize is not None and not self.whole:
            fill = torch.tensor(self.mean)[:, None, None]
            return self.normalize(resize_and_crop(pixels, self.size, self.resize, fill))
        heights, widths = (torch.full((len(pixels),), side) for side in pixels.shape[2:])
        return self.normalize(resize_boxes(pixels, self._boxes(heights, widths), self.size))

    def of_files(self, images: list[Image.Image]) -> Tensor:
        """Decoded files to normalized float32 (B, C, size, size)."""
        if self.resize is not None and not self.whole:
            views = [pil_to_tensor(resize_and_crop_image(image, self.size, self.resize, self.mean)) for image in images]
        else:
            boxes = self._boxes(torch.tensor([i.height for i in images]), torch.tensor([i.width for i in images]))
            views = [resize_box_of_image(image, box, self.size) for image, box in zip(images, boxes, strict=True)]
        return self.normalize(as_float(stack_views(views, len(self.mean))))


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, which Pillow and torch use where they antialias."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: (1 - x.abs()).clamp_min(0),
    "bicubic": _bicubic,
    "lanczos": lambda x: torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0),
    "box": lambda x: ((x > -0.5) & (x <= 0.5)).float(),
    "hamming": lambda x: torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * (math.pi * x).cos()), 0.0),
}


def resized_sizes(heights: Tensor, widths: Tensor, resize: Resize) -> tuple[Tensor, Tensor]:
    """Heights and widths after the resize and before the crop, int64."""
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
    """Resizes and crops equal-sized images by matrices, on their device.

    Args:
        pixels: uint8 of shape (B, C, H, W); H and W may be symbols of a traced graph.
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
    """:func:`resize_and_crop` of one image by Pillow; its mode is ``L``, ``RGB``, or ``F`` with values in [0, 1]."""
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
