"""Images of more than 8 bits: which stored numbers are black and white, for a whole data set alike.

A scale for each file would show two scans of one tissue at two brightnesses, and a single value of 1.001 would turn a float image black.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BeforeValidator
from torch import Tensor

from ssl_pipeline.data.files import FileTable
from ssl_pipeline.data.verdicts import warn_once

Range = tuple[float, float]
KINDS = ("8 bits", "16 bits", "32-bit integers", "floats")
SHALLOW, SIXTEEN, INTEGERS, FLOATS = range(4)
COLUMNS: dict[str, Any] = {
    "kind": np.uint8,  # which of KINDS
    "low": np.float64,  # the least stored value, and so on; 0 in images of 8 bits
    "high": np.float64,
    "low_percentile": np.float64,  # the first
    "high_percentile": np.float64,  # the 99th
}
_OF_DTYPE: dict[int, Range] = {SIXTEEN: (0.0, 65535.0), INTEGERS: (-(2.0**31), 2.0**31 - 1), FLOATS: (0.0, 1.0)}
_LOOKED_AT = 64


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
    """Which of :data:`KINDS` an image of one of Pillow's modes is."""
    return SIXTEEN if mode.startswith("I;16") else INTEGERS if mode.startswith("I") else FLOATS * (mode == "F")


@dataclass(frozen=True)
class Values:
    """What an image stores; see :data:`COLUMNS`."""

    kind: int = SHALLOW
    low: float = 0.0
    high: float = 0.0
    low_percentile: float = 0.0
    high_percentile: float = 0.0


def measure(image: Image.Image) -> Values:
    """The values of a decoded image; infinities and what is no number do not count."""
    kind = kind_of(image.mode)
    values = np.asarray(image).astype(np.float64).ravel() if kind else np.empty(0)
    values = values[np.isfinite(values)]
    if not values.size:
        return Values(kind)
    return Values(kind, float(values.min()), float(values.max()), *map(float, np.percentile(values, (1, 99))))


def settle(key: RangeKey, files: FileTable) -> Range | None:
    """The values that are black and white in all files; None where none has more than 8 bits.

    ``auto`` takes for whole numbers from 0 on the least number of bits that holds them all, ``[0, 4095]`` for 12 bits in 16; for floats
    in [0, 1] that; and otherwise the least and the greatest value of all.

    Args:
        key: as the user gives it.
        files: with :data:`COLUMNS`.
    """
    columns = {name: files.column(name) for name in COLUMNS}
    kinds = columns["kind"]
    if kinds is None or not bool((kinds > 0).any()):
        return None
    if isinstance(key, tuple):
        return key
    deep = kinds > 0
    low, high, low_percentile, high_percentile = (
        column[deep] for name, column in columns.items() if name != "kind" and column is not None
    )
    kind = int(kinds.max())
    if key == "dtype":
        return _OF_DTYPE[kind]
    if key == "percentiles":
        return _apart(float(low_percentile.median()), float(high_percentile.median()))
    least, greatest = float(low.min()), float(high.max())
    if least < 0:
        return _apart(least, greatest)
    if kind == FLOATS:
        return 0.0, max(1.0, greatest)
    return 0.0, float(2 ** max(8, int(greatest).bit_length()) - 1)


def _apart(low: float, high: float) -> Range:
    return (low, high) if low < high else (low, low + 1.0)


def stored_mode(file: Image.Image) -> str:
    """Pillow's mode; ``RGB;16`` where it holds 16 bits a color, of which Pillow reads the upper 8."""
    told = " ".join(str(tile[3]) for tile in getattr(file, "tile", []))
    return "RGB;16" if file.mode in ("RGB", "RGBA") and ";16" in told else file.mode


def measured(open_image: Callable[[int], Image.Image], count: int, name: str) -> FileTable:
    """The values of a few images spread over many, for sources that nobody has looked through.

    Args:
        open_image: opens an image by its number, as it is stored.
        count: how many images there are.
        name: of all of them, for messages.
    """
    places = sorted({i * count // _LOOKED_AT for i in range(_LOOKED_AT)}) if count else []
    found, cut = [], 0
    for place in places:
        try:
            with open_image(place) as image:
                cut += stored_mode(image) == "RGB;16"
                if kind_of(image.mode):
                    found.append(measure(image))
        except MemoryError:
            raise
        except Exception:  # decoders answer damaged bytes with nearly any error; it is told when its turn comes
            continue
    if cut:
        warn_once(f"{name}: images hold colors of 16 bits, of which Pillow reads the upper 8")
    columns: dict[str, Tensor] = {name: torch.tensor([getattr(one, name) for one in found]) for name in COLUMNS}
    return FileTable(*FileTable.of([str(i) for i in range(len(found))]).packed(), columns)


def describe_range(value_range: Range) -> str:
    """In words."""
    return f"{value_range[0]:g} is black and {value_range[1]:g} white (`data.range`)"
