"""Tar shards for tests: tiny images whose grayscale value says which they are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def png(grayscale: int, size: tuple[int, int] = (12, 10)) -> bytes:
    data = io.BytesIO()
    Image.new("L", size, grayscale).save(data, "png")
    return data.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w") -> Path:
    """Writes an archive of files, and of headers without content as they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                archive.addfile(header, io.BytesIO(member[1]))
    return path


def write_shards(folder: Path, sizes: Iterable[int], classes: int = 2) -> list[Path]:
    """One archive per size; sample ``n`` of all is a grayscale image of value ``n % 256`` with label ``n % classes``."""
    paths, n = [], 0
    for number, size in enumerate(sizes):
        members: list[tuple[str, bytes]] = []
        for _ in range(size):
            members += [(f"{n:04}.cls", str(n % classes).encode()), (f"{n:04}.png", png(n % 256))]
            n += 1
        paths.append(write_tar(folder / f"train-{number:02}.tar", members))
    return paths
