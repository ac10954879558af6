"""How published weights want an image brought to their size: torchvision's and timm's evaluation transforms, as numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssl_pipeline.config.base import FrozenModel

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class Resize(FrozenModel):
    """A resize, after which the central square of the network's size is cut out.

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
        side = {"center": "shorter side", "squash": "both sides", "border": "longer side, with a border,"}[
            self.crop_mode
        ]
        return f"{side} resized to {self.resize_size} px ({self.interpolation}), central {size} px"
