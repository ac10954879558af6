"""One image file to one 8-bit image, whatever it is stored as."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ssl_pipeline.config.base import UserError

_FAULTS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)


class DecodeError(UserError):
    """A file that is no whole image."""

    def __init__(self, path: Path, fault: str) -> None:
        self.path, self.fault = path, fault
        super().__init__(
            f"{path} can't be read as an image: {fault}. Remove or replace it, or set `data.on_unreadable=skip`."
        )

    def __reduce__(self) -> tuple[type[DecodeError], tuple[Path, str]]:
        """A worker sends it to the main process."""
        return DecodeError, (self.path, self.fault)


def decode(path: Path, channels: int) -> Image.Image:
    """Reads an image file.

    EXIF rotation is applied, an animation gives its first frame, transparency is laid on white, and 16-bit, 32-bit and
    float values are rescaled rather than clipped.

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.

    Raises:
        DecodeError: naming the file and what is wrong with it.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                image = ImageOps.exif_transpose(file)
        return _to_8_bit(image, mode)
    except _FAULTS as error:
        raise DecodeError(path, explain(path, error)) from error


def header_fault(path: Path) -> str | None:
    """What is wrong with a file's header, or None; much faster than decoding, and blind to damage further in."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                width, height = file.size
        return None if width and height else "it has no pixels"
    except _FAULTS as error:
        return explain(path, error)


def explain(path: Path, error: Exception) -> str:
    """A decoder's error in words."""
    if path.exists() and path.stat().st_size == 0:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"
    if isinstance(error, FileNotFoundError):
        return "it is not there (a broken link?)"
    return str(error).rstrip(".") or type(error).__name__


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = _range(image.mode, values)
        scaled = (values - low) / max(high - low, 1e-12) * 255
        image = Image.fromarray(np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == mode else image.convert(mode)


def _range(mode: str, values: NDArray[np.float64]) -> tuple[float, float]:
    """Black and white of a deep image: 16 bits use their whole range, floats [0, 1]; others what they hold."""
    if mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    for white in (1.0, 255.0) if mode == "F" else (255.0, 65535.0):
        if low >= 0 and high <= white:
            return 0.0, white
    return low, high
