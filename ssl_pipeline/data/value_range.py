"""Images of more than 8 bits: which stored numbers are black and white, for a whole data set alike.

A scale for each file would show two scans of one tissue at two brightnesses, and a single value of 1.001 would turn a float image black.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BeforeValidator

from ssl_pipeline.data.bad_files import warn_once

Range = tuple[float, float]
SHALLOW, SIXTEEN, INTEGERS, FLOATS = range(4)  # 8 bits, 16 bits, 32-bit integers, floats
COLUMNS: dict[str, Any] = {
    "kind": np.uint8,  # of those
    "low": np.float64,  # the least stored value, and so on; 0 in images of 8 bits
    "high": np.float64,
    "low_percentile": np.float64,  # the first
    "high_percentile": np.float64,  # the 99th
}
_OF_DTYPE: dict[int, Range] = {SIXTEEN: (0.0, 65535.0), INTEGERS: (-(2.0**31), 2.0**31 - 1), FLOATS: (0.0, 1.0)}
_MEASURED = 64  # images of a source that was not indexed


def _parse(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != 2 or not all(isinstance(v, int | float) for v in value) or not value[0] < value[1]:
            raise ValueError(
                f"write the value that is black and the one that is white, as [0,4095]; got {list(value)}."
            )
        return tuple(map(float, value))
    return value


RangeKey = Annotated[Literal["auto", "dtype", "percentiles"] | Range, BeforeValidator(_parse)]


def kind_of(mode: str) -> int:
    """What an image of one of Pillow's modes stores."""
    return SIXTEEN if mode.startswith("I;16") else INTEGERS if mode.startswith("I") else FLOATS * (mode == "F")


def stored_mode(file: Image.Image) -> str:
    """Pillow's mode; ``RGB;16`` where it holds 16 bits a color, of which Pillow reads the upper 8."""
    tiles = " ".join(str(tile[3]) for tile in getattr(file, "tile", []))
    return "RGB;16" if file.mode in ("RGB", "RGBA") and ";16" in tiles else file.mode


def measure(image: Image.Image | None = None) -> dict[str, float]:
    """:data:`COLUMNS` of a stored image; infinities and NaN do not count. All are 0 for 8 bits."""
    kind = kind_of(image.mode) if image else SHALLOW
    values = np.asarray(image).astype(np.float64).ravel() if kind else np.empty(0)
    values = values[np.isfinite(values)]
    found = [values.min(), values.max(), *np.percentile(values, (1, 99))] if values.size else [0.0] * 4
    return dict(zip(COLUMNS, (kind, *map(float, found)), strict=True))


def settle(key: RangeKey, columns: Mapping[str, np.ndarray]) -> Range | None:
    """The values that are black and white in all images; None where none has more than 8 bits.

    ``auto`` takes for whole numbers from 0 on the least number of bits that holds them all, ``[0, 4095]`` for 12 bits in 16; for floats
    in [0, 1] that; and otherwise the least and the greatest value of all.
    """
    deep = columns["kind"] > SHALLOW
    if not deep.any():
        return None
    if isinstance(key, tuple):
        return key
    kind = int(columns["kind"].max())
    least, greatest = float(columns["low"][deep].min()), float(columns["high"][deep].max())
    if key == "dtype":
        return _OF_DTYPE[kind]
    if key == "percentiles":
        names = ("low_percentile", "high_percentile")
        least, greatest = (float(np.quantile(columns[name][deep], 0.5, method="lower")) for name in names)
    elif least >= 0:
        return 0.0, max(1.0, greatest) if kind == FLOATS else float(2 ** max(8, int(greatest).bit_length()) - 1)
    return (least, greatest) if least < greatest else (least, least + 1.0)


def measured(open_image: Callable[[int], Image.Image], count: int, name: str) -> dict[str, np.ndarray]:
    """The values of a few images spread over many, each opened as it is stored, for sources that were not indexed."""
    places = sorted({i * count // _MEASURED for i in range(_MEASURED)}) if count else []
    found, cut = [], 0
    for place in places:
        try:
            with open_image(place) as image:
                cut += stored_mode(image) == "RGB;16"
                found.append(measure(image))
        except MemoryError:
            raise
        except Exception:  # decoders answer damaged bytes with nearly any error; it is reported when its turn comes
            continue
    if cut:
        warn_once(f"{name}: images hold colors of 16 bits, of which Pillow reads the upper 8")
    return {key: np.array([one[key] for one in found], kind) for key, kind in COLUMNS.items()}


def describe_range(value_range: Range) -> str:
    """The values in words."""
    return f"{value_range[0]:g} is black and {value_range[1]:g} white (`data.range`)"
