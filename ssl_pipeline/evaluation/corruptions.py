"""Corrupted images at five strengths (after Hendrycks and Dietterich 2019, ImageNet-C).

Their strengths, for images of 224 px; lengths in pixels are scaled to the image, and the blur (1, 2, 3, 4 and 6 pixels there) is a
little stronger, or images of 32 px would not change. Every draw is named by the sample, so that two encoders see the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import as_8_bit
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.crop import central_boxes
from ssl_pipeline.transforms.preprocessing import Resize, resize_and_crop_image

Values = NDArray[np.float64]
STRENGTHS = (1, 2, 3, 4, 5)
_NOMINAL = 224


def _gaussian_noise(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    values = _values(image)
    return _image(values + strength * draws.standard_normal(values.shape))


def _shot_noise(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """Few photons: a pixel counts ``strength`` of them where it is white."""
    return _image(draws.poisson(_values(image) * strength) / strength)


def _impulse_noise(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """A share of the values becomes black or white."""
    values = _values(image)
    drawn = draws.random(values.shape)
    values[drawn < strength] = 1
    values[drawn < strength / 2] = 0
    return _image(values)


def _gaussian_blur(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(strength * image.width / _NOMINAL))


def _contrast(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """The distance from each channel's mean is scaled."""
    values = _values(image)
    mean = values.mean((0, 1), keepdims=True)
    return _image((values - mean) * strength + mean)


def _brightness(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """HSV's value grows; hue and saturation stay where it is not clipped."""
    values = _values(image)
    value = values.max(2, keepdims=True)
    return _image(np.where(value > 0, values / np.maximum(value, 1e-9), 1) * np.minimum(value + strength, 1))


def _jpeg(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=int(strength))
    with Image.open(file) as stored:
        return stored.convert(image.mode)


def _pixelate(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    side = max(1, round(image.width * strength))
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


_Corrupt = Callable[[Image.Image, float, np.random.Generator], Image.Image]
CORRUPTIONS: dict[str, tuple[_Corrupt, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_gaussian_blur, (2, 3, 4, 5, 7)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}


class Corrupted(IndexedDataset):
    """A source, grayscale or RGB, whose images are the central squares that an encoder sees, corrupted.

    ``resize`` is the encoder's own resize to the size, where published weights have one, and ``fill`` the color of a border that it
    may leave, in [0, 1], a value a channel.
    """

    def __init__(
        self, source: IndexedDataset, size: int, name: str, strength: int, seed: int = 0, resize: Resize | None = None,
        fill: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        assert strength in STRENGTHS
        self._resize, self._fill = resize, fill
        self._source, self._size, self._corruption, self._strength, self._seed = source, size, name, strength, seed
        self.name = f"{source.name} ({name} {strength})"
        self.channels, self.classes, self.labels = source.channels, source.classes, source.labels
        self.bad_files = source.bad_files

    def __len__(self) -> int:
        return len(self._source)

    def open_image(self, index: int) -> Image.Image:
        mode = "L" if self.channels == 1 else "RGB"
        square = self._square(as_8_bit(self._source.open_image(index), mode))
        corrupt, strengths = CORRUPTIONS[self._corruption]
        key = derive_seed(self._seed, "corruption", self._corruption, self._strength, index)
        return corrupt(square, strengths[self._strength - 1], np.random.Generator(np.random.Philox(key)))

    def _square(self, image: Image.Image) -> Image.Image:
        if self._resize is not None:
            return resize_and_crop_image(image, self._size, self._resize, self._fill)
        (box,) = central_boxes(torch.tensor([image.height]), torch.tensor([image.width])).tolist()
        top, left, height, width = box
        square = image.crop((left, top, left + width, top + height))
        return square.resize((self._size, self._size), Image.Resampling.BILINEAR)

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}/{self._size}{self._resize or ''}/{self._corruption}/{self._strength}/{self._seed}"

    def select(self, index: Tensor) -> Corrupted:
        raise NotImplementedError("select from the clean images, and corrupt the selection")


def _values(image: Image.Image) -> Values:
    """(H, W, C) in [0, 1]."""
    values = np.asarray(image, dtype=np.float64) / 255
    return values[:, :, None] if values.ndim == 2 else values


def _image(values: Values) -> Image.Image:
    stored = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(stored[:, :, 0] if stored.shape[2] == 1 else stored)
