"""MNIST's IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError

_UINT8 = 8


def find_idx(folder: Path, name: str) -> Path:
    """The file of a name, gzipped or not, in a folder or where torchvision would put it.

    Raises:
        ConfigError: it is not there.
    """
    for place in (folder, folder / "FashionMNIST" / "raw", folder / "raw"):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise ConfigError(
        f"{str(folder)!r} holds no {name} (.gz or not): `data.path` must be a folder with the four idx files."
    )


def read_idx(path: Path) -> Tensor:
    """Reads one array of bytes.

    Returns:
        uint8 of the shape that the file declares.

    Raises:
        ConfigError: it is no whole IDX file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} can't be read ({error}): it is missing or damaged. Copy it anew.") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, _UINT8]):
        raise ConfigError(
            f"{path} is no IDX file of bytes: it should begin with 00 00 08, and begins with {data[:3].hex(' ') or 'nothing'}."
        )
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ConfigError(f"{path} ends within its header: it is cut off. Copy it anew.")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise ConfigError(
            f"{path} declares {math.prod(shape)} bytes and holds {len(data) - start}: it is cut off or damaged. Copy it anew."
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).copy()).reshape(shape)


def write_idx(path: Path, array: Tensor) -> None:
    """Writes uint8 of any shape; gzipped, the same bytes every time, if the name ends in .gz."""
    header = bytes([0, 0, _UINT8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    data = header + array.contiguous().numpy().tobytes()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)
