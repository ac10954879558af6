"""Datasets of encoded images: files in memory, in a table's cells or in an archive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.data.decode import DecodeError, EncodedImage
from ssl_pipeline.data.value_range import Range


class EncodedReader(ABC):
    """Decodes samples that come as the bytes of an image file; headers say how much each may shrink."""

    channels: int
    value_range: Range | None = None
    _opened: dict[int, EncodedImage] | None = None

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of one image file."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What a message calls one sample."""

    def open_encoded(self, index: int) -> EncodedImage:
        return EncodedImage(self.encoded(index), Path(self.describe(index)))

    def open_image(self, index: int) -> Image.Image:
        return self.open_encoded(index).decode(self.channels, 1, self.value_range)

    def open_stored(self, index: int) -> Image.Image:
        return Image.open(BytesIO(self.encoded(index)))

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Heights and widths, 1 by 1 where a header can't be read; the images stay open, because they are wanted next."""
        self._opened, found = {}, list[tuple[int, int]]()
        for i in index.tolist():
            try:
                image = self._opened[i] = self.open_encoded(i)
                found.append((image.height, image.width))
            except DecodeError:  # decoding raises it again
                found.append((1, 1))
        heights, widths = torch.tensor(found).unbind(1)
        return heights, widths

    def open_reduced(self, index: int, factor: int) -> Image.Image:
        opened = self._opened.pop(index, None) if self._opened else None
        return (self.open_encoded(index) if opened is None else opened).decode(self.channels, factor, self.value_range)
