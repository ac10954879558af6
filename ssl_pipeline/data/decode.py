"""One image file to one image, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ssl_pipeline.config.base import UserError
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.value_range import Range, kind_of, measure, stored_mode

_ORIENTATION, _SIDEWAYS = 0x0112, range(5, 9)
_GRAYSCALE_MODES = ("1", "L", "LA", "La", "I", "F")  # Pillow's modes, without what follows a semicolon
_READ = "Grayscale of up to 32 bits and colors of 8 bits are read: write the bands that matter as such files"
_TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")


class DecodeError(UserError):
    """A file that is no whole image; ``fault`` says what is wrong with it."""

    everywhere = False

    def __init__(self, path: Path, fault: str) -> None:
        self.path, self.fault = path, fault
        super().__init__(f"{path} can't be read as an image: {fault}. Remove or replace the file.")

    def __reduce__(self) -> tuple[type[DecodeError], tuple[Path, str]]:
        return DecodeError, (self.path, self.fault)  # a worker sends it to the main process


def is_grayscale(mode: str) -> bool:
    """Whether one of Pillow's modes holds no color."""
    return mode.split(";")[0] in _GRAYSCALE_MODES


def decode(
    path: Path,
    channels: int,
    min_size: int | None = None,
    value_range: Range | None = None,
    data: bytes | None = None,
) -> Image.Image:
    """Reads an image file.

    EXIF rotation is applied, an animation gives its first frame, and transparency is laid on white. Values of more than
    8 bits keep their bits where the data set's range is known. Of a file alone they are rescaled to 8 bits, never clipped: 16
    bits by their whole range; 32-bit integers by the least of 0..255 and 0..65535 that holds them all, floats by that of 0..1
    and 0..255; and any others are spread from their least to their greatest.

    Args:
        path: the file.
        channels: 1 for grayscale, 3 for RGB.
        min_size: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, several times faster, as long as its
            shorter side keeps this many pixels. Other formats ignore it.
        value_range: the stored values that are black and white, where they have more than 8 bits.
        data: the file's bytes, where they are in memory already.

    Returns:
        An image of mode ``L`` or ``RGB``; or, of more than 8 bits and with a range, of mode ``F``: grayscale in [0, 1].

    Raises:
        DecodeError: naming the file and what is wrong with it.
    """
    with decode_errors(path, data), Image.open(path if data is None else BytesIO(data)) as file:
        return _load(file, channels, min_size, value_range)


@contextmanager
def decode_errors(path: Path, data: bytes | None = None) -> Iterator[None]:
    """Whatever a decoder answers to damaged bytes (nearly any error) is a :class:`DecodeError`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # struct's, zlib's, IndexError, ...
        if data is not None and isinstance(error, UnidentifiedImageError):
            raise DecodeError(path, "it is no image of a known format" if data else "it is empty") from error
        raise DecodeError(path, explain(path, error)) from error


def _load(file: ImageFile.ImageFile, channels: int, min_size: int | None, value_range: Range | None) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if min_size is not None:
        file.draft(mode, (min_size, min_size))
    _refuse_other_bands(file)
    file.load()
    # Asked for first, because what need not be turned would be copied.
    turned = file.getexif().get(_ORIENTATION, 1) != 1
    return at_range(ImageOps.exif_transpose(file) if turned else file, mode, value_range, file.format)


def at_range(image: Image.Image, mode: str, value_range: Range | None, stored_as: str | None = None) -> Image.Image:
    """A stored image in a mode of 8 bits; or, of more than 8 bits and with a range, in mode ``F``: grayscale in [0, 1]."""
    if kind_of(image.mode):
        if value_range is not None:
            return _scaled(np.asarray(image), value_range)
        warn_once(
            "images of more than 8 bits are scaled one by one, and to 8 bits: none of those that the range of values is settled "
            "by has more. Give it by `data.range=[LOW,HIGH]`."
        )
    return _to_8_bit(image, mode, stored_as)


class EncodedImage:
    """An image file in memory. Only its header is read at first; the size in it says how far decoding may shrink the image.

    Attributes:
        height: in pixels, after EXIF rotation; ``width`` too.

    Raises:
        DecodeError: naming the image and what is wrong with it.
    """

    def __init__(self, data: bytes, name: Path) -> None:
        self._data, self._name = data, name
        with decode_errors(name, data):
            self._file = Image.open(BytesIO(data))
            self.width, self.height = _upright_size(self._file)

    def decode(self, channels: int, factor: int, value_range: Range | None) -> Image.Image:
        """The image, once: a JPEG at 1/factor of its size."""
        with decode_errors(self._name, self._data), self._file as file:
            return _load(file, channels, min(self.height, self.width) // factor if factor > 1 else None, value_range)


@dataclass(frozen=True)
class Header:
    """What a file says of its image.

    Attributes:
        width: in pixels, after EXIF rotation; ``height`` too.
        mode: Pillow's name of what is stored: ``RGB``, ``CMYK``, ``I;16``, ...
        traits: of ``animated``, ``rotated`` and ``transparent``, those that hold.
        values: the stored values of more than 8 bits, see :data:`ssl_pipeline.data.value_range.COLUMNS`.
    """

    width: int
    height: int
    mode: str
    traits: frozenset[str] = frozenset()
    values: dict[str, float] = field(default_factory=measure)


def check_header(path: Path) -> Header:
    """A file's header, read much faster than decoding, and blind to damage further in.

    Raises:
        DecodeError: naming the file and what is wrong with it.
    """
    with decode_errors(path):
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")  # opening a pipe would wait for ever
        with Image.open(path) as file:
            _refuse_other_bands(file)
            found = {
                "animated": getattr(file, "is_animated", False),
                "rotated": _orientation(file) in range(2, 9),
                "transparent": file.mode in _TRANSPARENT or "transparency" in file.info,
            }
            width, height = _upright_size(file)
            if min(width, height) == 0:
                raise ValueError("it has no pixels")
            traits = frozenset(name for name, holds in found.items() if holds)
            return Header(width, height, stored_mode(file), traits, measure(file))


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file after EXIF rotation, by its header; raises as :func:`check_header`."""
    header = check_header(path)
    return header.height, header.width


def _refuse_other_bands(file: Image.Image) -> None:
    """Pillow drops a TIFF's bands behind the colors without a word."""
    bands = getattr(file, "tag_v2", {}).get(TiffImagePlugin.SAMPLESPERPIXEL, 0)
    if bands > len(file.getbands()):
        raise ValueError(f"it has {bands} bands. {_READ}")


def _orientation(file: Image.Image) -> int:
    # A PNG without EXIF before its pixels would be decoded in search of it.
    may_have_exif = file.format != "PNG" or "exif" in file.info
    return int(file.getexif().get(_ORIENTATION, 1)) if may_have_exif else 1


def _upright_size(file: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation."""
    width, height = file.size
    return (height, width) if _orientation(file) in _SIDEWAYS else (width, height)


def explain(path: Path, error: Exception) -> str:
    """A decoder's error in words."""
    if isinstance(error, FileNotFoundError):
        return "it is not there (a broken link?)"
    if isinstance(error, PermissionError):
        return "this user may not read it"
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if path.stat().st_size == 0 else _bands(path) or "it is no image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, which is too large (scale it down)"
    return str(error).rstrip(".") or type(error).__name__


def _bands(path: Path) -> str | None:
    """What a TIFF that Pillow does not know holds, in words; None for other files."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:2] not in (b"II", b"MM"):
                return None
            tags = TiffImagePlugin.ImageFileDirectory_v2(start)
            file.seek(tags.next)
            tags.load(file)
        bands, bits = tags[TiffImagePlugin.SAMPLESPERPIXEL], tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    except MemoryError:
        raise
    except Exception:  # decoders answer damaged bytes with nearly any error
        return None
    return f"it has {bands} bands of {bits[0]} bits. {_READ}"


def _to_8_bit(image: Image.Image, mode: str, stored_as: str | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow reads a PGM of more than 8 bits as 32-bit integers that it has spread over 16 bits.
        whole_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and stored_as == "PPM")
        image = _rescale(np.asarray(image), whole_16_bits)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == mode else image.convert(mode)


def _scaled(stored: np.ndarray, value_range: Range) -> Image.Image:
    """Numbers of shape (H, W) to grayscale in [0, 1], in float32: no bit of 16 is lost; NaN becomes black."""
    low, high = value_range
    shares = (stored.astype(np.float64) - low) / (high - low)
    return Image.fromarray(np.nan_to_num(shares, nan=0.0).clip(0, 1).astype(np.float32))


def as_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """A decoded image to show, in a mode of 8 bits."""
    if image.mode == "F":
        image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _rescale(stored: np.ndarray, whole_16_bits: bool) -> Image.Image:
    """Numbers of shape (H, W) to grayscale; infinities become black or white, and NaN black."""
    values = stored.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whites = (65535.0,) if whole_16_bits else (1.0, 255.0) if stored.dtype.kind == "f" else (255.0, 65535.0)
    if low >= 0 and high <= whites[-1]:
        low, high = 0.0, next(white for white in whites if high <= white)
    scaled = (values - low) * (255 / max(high - low, 1e-12))
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
